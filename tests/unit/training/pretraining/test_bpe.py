"""The shipped tokenizer: made again byte for byte, loadable by others, and cut for copying."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import seamount.models
from seamount.training.pretraining.bpe import BOS, EOS, SPECIAL_TOKENS, THINK_END, VOCABULARY_SIZE, train, write

FOLDER = Path(seamount.models.__file__).parent / "embedded" / "seamount-tiny"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def pieces(text):
    return [TOKENIZER.decode([token]) for token in TOKENIZER.encode(text).ids]


def test_anyone_can_make_the_shipped_tokenizer_again(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes((FOLDER / "chat_template.jinja").read_bytes())
    write(train(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_the_vocabulary_is_exactly_as_large_as_the_network_expects():
    assert TOKENIZER.get_vocab_size() == VOCABULARY_SIZE == 4096
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(4096))
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_too_poor_a_corpus_is_refused():
    with pytest.raises(ValueError, match="not 4096"):
        train(items_per_skill=2)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives_the_round_trip(text):
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_digits_and_chinese_characters_stand_alone_and_names_are_cut_alike_everywhere():
    assert pieces("2048") == ["2", "0", "4", "8"]
    assert pieces("水泵压力") == ["水", "泵", "压", "力"]
    name = TOKENIZER.encode("Maria").ids
    assert TOKENIZER.encode("for Maria").ids[-len(name) :] == name
    assert TOKENIZER.encode('{"name":"Maria').ids[-len(name) :] == name


def test_transformers_loads_it_with_its_marks():
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    assert (loaded.bos_token, loaded.eos_token) == (BOS, EOS)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (0, 1)
    text = "Run `make serve`. 运行"
    assert loaded(text)["input_ids"] == TOKENIZER.encode(text).ids
    # The reasoning mark must survive decoding for people, the end of the sentence must not.
    ids = TOKENIZER.encode(f"a{THINK_END}b{EOS}").ids
    assert loaded.decode(ids, skip_special_tokens=True) == f"a{THINK_END}b"


def test_the_template_file_and_the_entry_in_the_config_are_the_same():
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
