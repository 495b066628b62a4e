"""Token ids become text piece by piece, with whole characters only."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from seamount.core.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from seamount.models.tokenizer import TextTokenizer


def save(folder: Path, tokenizer: Tokenizer) -> TextTokenizer:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return TextTokenizer(folder)


@pytest.fixture
def byte_level(tmp_path: Path) -> TextTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<｜end▁of▁sentence｜>", "<think>"])
    tokenizer.add_tokens(["</think>", "two words", "naïve"])
    return save(tmp_path, tokenizer)


@pytest.fixture
def sentencepiece(tmp_path: Path) -> TextTokenizer:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é", "<0xZZ>"]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return save(tmp_path, tokenizer)


def test_a_character_is_held_back_until_it_is_whole(byte_level: TextTokenizer) -> None:
    ids = byte_level.encode("a😀é", add_special_tokens=False)
    assert len(ids) == 7
    detokenizer = byte_level.detokenizer(skip_special_tokens=True)
    assert [detokenizer.push([i]) for i in ids] == ["a", "", "", "", "😀", "", "é"]
    assert detokenizer.flush() == ""


def test_bytes_that_cannot_become_a_character_turn_into_replacements(byte_level: TextTokenizer) -> None:
    emoji = byte_level.encode("😀", add_special_tokens=False)
    letter = byte_level.encode("a", add_special_tokens=False)
    detokenizer = byte_level.detokenizer(skip_special_tokens=True)
    assert detokenizer.push(emoji[:2]) == ""
    assert detokenizer.push(letter) == "\ufffda"
    assert detokenizer.push(emoji[:3]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens_are_dropped_when_asked_but_never_the_reasoning_tags(byte_level: TextTokenizer) -> None:
    text = "<think>a</think>b<｜end▁of▁sentence｜>"
    ids = byte_level.encode(text, add_special_tokens=False)
    assert len(ids) == 5
    assert byte_level.decode(ids, skip_special_tokens=True) == "<think>a</think>b"
    assert byte_level.decode(ids, skip_special_tokens=False) == text


def test_added_tokens_outside_the_byte_alphabet_keep_their_text(byte_level: TextTokenizer) -> None:
    ids = byte_level.encode("two words<｜end▁of▁sentence｜>", add_special_tokens=False)
    assert byte_level.decode(ids, skip_special_tokens=False) == "two words<｜end▁of▁sentence｜>"


def test_unknown_ids_stand_for_nothing(byte_level: TextTokenizer) -> None:
    assert byte_level.decode([10**6, -1, 2**40], skip_special_tokens=True) == ""


def test_sentencepiece_spaces_and_byte_fallback(sentencepiece: TextTokenizer) -> None:
    ids = sentencepiece.encode("a b 你a", add_special_tokens=False)
    assert sentencepiece.decode(ids, skip_special_tokens=True) == "a b 你a"
    detokenizer = sentencepiece.detokenizer(skip_special_tokens=True)
    pieces = [detokenizer.push([i]) for i in ids] + [detokenizer.flush()]
    assert "".join(pieces) == "a b 你a"
    assert "\ufffd" not in "".join(pieces)
    assert sentencepiece.decode([sentencepiece.token_id("<0xZZ>") or 0], skip_special_tokens=True) == "<0xZZ>"


def test_metaspace_strips_the_first_space_only(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("▁", -1.0), ("▁a", -1.5), ("a", -2.0), ("<unk>", -9.0)], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    ours = save(tmp_path, tokenizer)
    assert ours.decode(ours.encode("a a a", add_special_tokens=False), skip_special_tokens=True) == "a a a"


def test_a_guarded_stretch_in_the_middle_gets_no_prefix_space(tmp_path: Path) -> None:
    pieces = [("▁", -1.0), ("▁a", -1.5), ("a", -2.0), ("<", -3.0), (">", -3.0), ("s", -3.0), ("<unk>", -9.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=6))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "<x>"])
    ours = save(tmp_path, tokenizer)
    ids = ours.encode_guarded("<x>a\U000f0000s>a", {"\U000f0000": "<"})
    assert [tokenizer.id_to_token(i) for i in ids] == ["<x>", "a", "<", "s", ">", "a"]


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path, byte_level: TextTokenizer) -> None:
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    assert len(save(tmp_path, tokenizer).encode("abcdef", add_special_tokens=True)) == 6


def test_tokens_named_special_by_the_config_become_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "<end>": 1}, []))
    tokenizer.decoder = decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    ours = TextTokenizer(tmp_path, ["<end>", "<absent>"])
    assert ours.encode("a<end>", add_special_tokens=False) == (0, 1)
    assert ours.decode([0, 1], skip_special_tokens=True) == "a"
    assert ours.vocab_size == 2


def test_a_lone_surrogate_is_refused(byte_level: TextTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        byte_level.encode("a\ud800", add_special_tokens=False)


def test_a_decoder_that_would_be_decoded_wrongly_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        save(tmp_path, tokenizer)
    with pytest.raises(UnsupportedModelError, match="no decoder"):
        save(tmp_path, Tokenizer(models.BPE({"a": 0}, [])))


def broken(kind: str, good: dict[str, Any]) -> str:
    return {
        "empty": "",
        "cut": json.dumps(good)[:-40],
        "list": "[]",
        "no model": json.dumps({"version": "1.0"}),
        "text": "not json",
        "model of wrong type": json.dumps({**good, "model": {"type": "BPE", "vocab": [], "merges": {}}}),
        "merge of unknown": json.dumps({**good, "model": {**good["model"], "merges": ["x y"]}}),
        "deep": "[" * 100_000,
    }[kind]


KINDS = ["empty", "cut", "list", "no model", "text", "model of wrong type", "merge of unknown", "deep"]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_named(tmp_path: Path, byte_level: TextTokenizer, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(broken(kind, json.loads(path.read_text(encoding="utf-8"))))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path)


def test_files_that_are_no_tokenizer_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model but no") as caught:
        TextTokenizer(tmp_path)
    assert caught.value.hint and "Convert" in caught.value.hint
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="UTF-8"):
        TextTokenizer(tmp_path)
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte that must not be read
    with pytest.raises(CheckpointError, match="limit"):
        TextTokenizer(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a file"):
        TextTokenizer(tmp_path)


def test_an_empty_vocabulary_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({}, []))
    tokenizer.decoder = decoders.ByteLevel()
    with pytest.raises(CheckpointError, match="empty vocabulary"):
        save(tmp_path, tokenizer)


def test_an_added_token_with_options_is_matched_as_the_library_does(tmp_path: Path, byte_level: TextTokenizer) -> None:
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    ours = save(tmp_path, tokenizer)
    text = "a \U000f0000 <mask> b"
    guarded = ours.encode_guarded(text, {"\U000f0000": "<"})
    assert list(guarded) == tokenizer.encode(text.replace("\U000f0000", "<"), add_special_tokens=False).ids


def test_other_threads_run_while_a_long_text_is_encoded(byte_level: TextTokenizer) -> None:
    done = threading.Event()

    def encode() -> None:
        byte_level.encode("a" * 300_000, add_special_tokens=False)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    ran = 0
    while not done.is_set():
        time.sleep(0.0001)
        ran += 1
    thread.join()
    assert ran > 40  # hundreds; one that had to wait for the text would come around a few times


@pytest.mark.parametrize("text", ["", "a", " a", "</think><think>", "ab é 😀"])
def test_letters_in_the_middle_of_a_text_hold_no_markers(byte_level: TextTokenizer, text: str) -> None:
    ids = byte_level.encode_inside(text)
    assert b"".join(byte_level.token_bytes(i) for i in ids) == text.encode()
    assert not set(ids) & byte_level.marker_ids


def test_markers_are_what_is_special_or_spelled_as_one(byte_level: TextTokenizer) -> None:
    names = {byte_level.added_tokens[i] for i in byte_level.marker_ids}
    assert names == {"<｜end▁of▁sentence｜>", "<think>", "</think>"}


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_texts_behind_a_marker_are_encoded_as_in_the_whole(kind: str, request: pytest.FixtureRequest) -> None:
    ours: TextTokenizer = request.getfixturevalue(kind)
    end = ours.added_tokens[max(ours.special_ids)]
    texts = ["a b", " a", "", f"b{end}a", "é\n", "\U000f0000a"]
    pieces = [(text, {"\U000f0000": end[0]} if "\U000f0000" in text else {}) for text in texts]
    inside = ours.encode_many(pieces, inside=True)
    for (text, literals), ids in zip(pieces, inside, strict=True):
        whole = ours.encode_guarded(f"{end}{text}", literals)
        assert whole == (ours.token_id(end), *ids)
    for (text, literals), ids in zip(pieces, ours.encode_many(pieces, inside=False), strict=True):
        assert ids == ours.encode_guarded(text, literals)
    with pytest.raises(InvalidRequestError):
        ours.encode_many([("a", {}), ("\ud800", {})], inside=False)


def test_the_digest_is_of_the_vocabulary(byte_level: TextTokenizer, tmp_path: Path) -> None:
    again = TextTokenizer(tmp_path)
    assert again.digest() == byte_level.digest()
    changed = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    changed.add_tokens(["more"])
    (tmp_path / "other").mkdir()
    assert save(tmp_path / "other", changed).digest() != again.digest()
