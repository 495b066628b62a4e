"""However tokens arrive, the text is the library's; and guarding changes nothing but forged markers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from seamount.models.guard import MarkerGuard
from seamount.models.tokenizer import TextTokenizer

USER, EOS = "<｜User｜>", "<|end|>"
CORPUS = ["the cat sat on the mat 😀😃 你好世界 你们好 naïve café 12 34 5678\n\n", "def f(x):\n    return x + 1\n"] * 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Tokenizer]:
    """Ours and the library's, over one byte-level BPE with tokens that end inside characters."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    library.add_special_tokens([EOS, "<s>"])
    library.add_tokens([AddedToken(text, normalized=False) for text in (USER, "<think>", "</think>", "é é")])
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    library.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder), library


def pieces(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(edges)]


IDS = st.lists(st.integers(0, 440), max_size=40)
CUTS = st.lists(st.integers(0, 40), max_size=10)


@given(ids=IDS, cuts=CUTS, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_ids_decode_as_the_library_decodes_them(pair: Any, ids: list[int], cuts: list[int], skip: bool) -> None:
    ours, library = pair
    detokenizer = ours.detokenizer(skip_special_tokens=skip)
    text = "".join(detokenizer.push(piece) for piece in pieces(ids, cuts)) + detokenizer.flush()
    assert text == library.decode(ids, skip_special_tokens=skip)
    assert text == ours.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40), cuts=CUTS)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_and_no_piece_holds_half_a_character(pair: Any, text: str, cuts: list[int]) -> None:
    ours, _ = pair
    ids = list(ours.encode(text, add_special_tokens=False))
    detokenizer = ours.detokenizer(skip_special_tokens=False)
    parts = [detokenizer.push(piece) for piece in pieces(ids, cuts)]
    assert detokenizer.flush() == ""
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


WORDS = st.sampled_from(
    [USER, EOS, "<s>", "<｜", "User｜>", "<|en", "d|>", "<", ">", " ", "\n", "the", "你", "é é", "<think>"]
)
MARKUP = st.lists(WORDS, max_size=10).map("".join)


@given(contents=st.lists(MARKUP | st.text(max_size=12), min_size=1, max_size=4), strip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_guarded_prompts_hold_no_marker_but_the_templates(pair: Any, contents: list[str], strip: bool) -> None:
    ours, library = pair
    markers = {text: library.token_to_id(text) for text in (USER, EOS, "<s>")}
    guard = MarkerGuard(ours.added_tokens.values(), [ours.added_tokens[i] for i in ours.special_ids])
    (guarded,), literals = guard.guard(contents)

    def render(parts: list[str]) -> str:
        return "".join(USER + (part.strip() if strip else part) + EOS for part in parts)

    ids = list(ours.encode_guarded(render(guarded), literals))
    template_markers = [markers[USER], markers[EOS]] * len(contents)
    assert [i for i in ids if i in markers.values()] == template_markers
    assert ours.decode(ids, skip_special_tokens=False) == render(contents)
    if sum(i in markers.values() for i in library.encode(render(contents)).ids) == len(template_markers):
        assert ids == library.encode(render(contents)).ids  # nothing was forged: nothing is changed


@given(contents=st.lists(MARKUP, min_size=2, max_size=5))
@settings(max_examples=300, deadline=None)
def test_strings_joined_by_a_template_make_no_marker(pair: Any, contents: list[str]) -> None:
    ours, library = pair
    guard = MarkerGuard(ours.added_tokens.values(), [ours.added_tokens[i] for i in ours.special_ids])
    (guarded,), literals = guard.guard(contents)
    ids = ours.encode_guarded("".join(guarded), literals)
    assert not {library.token_to_id(text) for text in (USER, EOS, "<s>")} & set(ids)
