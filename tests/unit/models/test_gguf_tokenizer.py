"""A tokenizer that went into a GGUF file gives the same ids when it comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.gguf import Gguf
from seamount.models.gguf_tokenizer import TokenizerFiles, tokenizer_files
from seamount.models.prompt import PromptEncoder

SAMPLES = [
    "Hello, world! It's 12:30 on 2024-05-17; we'LL see.",
    "  Two  spaces,\ttabs\r\n\r\nand\n\n\n new lines  ",
    "你好，世界！今天天气怎么样？ 深度求索 123456789",
    "def f(x: int) -> str:\n    return f'{x!r}'  # done\n\n\tx_1 += a[0]*2**10;",
    "🙂👩‍👩‍👧‍👦 naïve café e\u0301 Ω≈ç√ ﬁ Straße ΑΒΓ абв",
    "日本語のテキスト、カタカナ 한국어 نص हिन्दी",
    "<think>\nOne.\n</think>\n\nTwo<｜end▁of▁sentence｜><|im_start|>user",
    "",
    " ",
]
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CONTROL = [BOS, EOS, "<|im_start|>", "<|im_end|>", "<｜tool▁calls▁begin｜>"]
PLAIN = ["<think>", "</think>"]


def trained(
    pre: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None, *, whole_words: bool = False
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in PLAIN])
    return tokenizer


def write(path: Path, tokenizer: Tokenizer, pre: str | None, **more: Any) -> Gguf:
    """Write the tokenizer as converters do, with three fillers at the end."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    texts = sorted(vocab, key=lambda text: vocab[text])
    types = [3 if text in CONTROL else 4 if text in PLAIN else 1 for text in texts]
    fillers = [f"[PAD{len(texts) + i}]" for i in range(3)]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model(more.pop("model", "gpt2"))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts + more.pop("extra", []) + fillers)
    writer.add_token_types(types + [1] * more.pop("num_extra", 0) + [5] * 3)
    writer.add_token_merges([" ".join(pair) for pair in merges] + more.pop("merges", []))
    writer.add_bos_token_id(vocab[BOS])
    writer.add_eos_token_id(more.pop("eos", vocab[EOS]))
    for key, value in more.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Gguf.from_file(path)


def encoder(files: TokenizerFiles, folder: Path) -> PromptEncoder:
    (folder / "tokenizer.json").write_text(json.dumps(files.tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(files.tokenizer_config), encoding="utf-8")
    return PromptEncoder.from_folder(folder)


def qwen() -> Tokenizer:
    pipeline = Qwen2Tokenizer().backend_tokenizer
    return trained(pipeline.pre_tokenizer, pipeline.normalizer)


def llama3() -> Tokenizer:
    pattern = TikTokenConverter(vocab_file="").pattern
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    return trained(pre_tokenizers.Sequence(steps), whole_words=True)


def gpt2() -> Tokenizer:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.mark.parametrize(
    ("pre", "make"),
    [("qwen2", qwen), ("deepseek-r1-qwen", qwen), ("llama-bpe", llama3), ("gpt-2", gpt2)],
)
def test_ids_are_those_of_the_original(pre: str, make: Any, tmp_path: Path) -> None:
    original = make()
    ours = encoder(tokenizer_files(write(tmp_path / "t.gguf", original, pre, add_add_bos_token=False)), tmp_path)
    for text in SAMPLES:
        ids = original.encode(text, add_special_tokens=False).ids
        assert list(ours.encode_text(text)) == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    assert ours.vocab_size == original.get_vocab_size()


# What DeepSeek's own tokenizers split these texts into.
PIECES = {
    "deepseek-v3": {
        "In 12345 days": ["In", " ", "123", "45", " days"],
        "你好world": ["你好", "world"],
        "x = f(a.b)\n\n  y": ["x", " =", " f", "(a", ".b", ")\n\n", " ", " y"],
        "don't ＯＫ，行": ["don", "'t", " ＯＫ", "，", "行"],
        "🙂 é हि": ["🙂", " é", " हि"],
    },
    "deepseek-llm": {
        "In 123 days": ["In", " ", "1", "2", "3", " days"],
        "你好world": ["你好", "world"],
        "a.b,c\n\nd  e": ["a", ".", "b", ",", "c", "\n", "\n", "d", " ", " e"],
        # Its punctuation runs from ":" to "~", which holds the letters of ASCII: these part from others.
        "naïve Straße абв": ["na", "ï", "ve", " Stra", "ß", "e", " абв"],
        "行。好": ["行", "。", "好"],
    },
    "deepseek-coder": {
        "x12 = y()": ["x", "1", "2", " =", " y", "()"],
        "naïve\nok": ["naïve", "\n", "ok"],
    },
    "default": {"In 12345 days!": ["In", " ", "123", "45", " days", "!"]},
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_as_the_original_splits_it(pre: str, tmp_path: Path) -> None:
    made = tokenizer_files(write(tmp_path / "t.gguf", gpt2(), pre)).tokenizer
    splitter = Tokenizer.from_str(json.dumps(made)).pre_tokenizer
    for text, pieces in PIECES[pre].items():
        found = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
        assert found == pieces, text


def test_special_tokens_and_template_arrive(tmp_path: Path) -> None:
    original = qwen()
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    file = write(tmp_path / "t.gguf", original, "qwen2", add_chat_template=template, add_add_bos_token=True)
    ours = encoder(tokenizer_files(file), tmp_path)
    bos, start = original.token_to_id(BOS), original.token_to_id("<|im_start|>")
    assert ours.bos_token_id == bos
    assert ours.eos_token_ids == (original.token_to_id(EOS),)
    assert ours.encode_text("Hi")[0] == bos
    assert ours.encode_chat([{"role": "user", "content": "Hi"}]).token_ids[:2] == (bos, start)
    everything = [original.token_to_id(text) for text in (EOS, "<think>", "<｜tool▁calls▁begin｜>")]
    assert ours.decode(everything, skip_special_tokens=True) == "<think><｜tool▁calls▁begin｜>"
    ours.close()


def test_several_templates_keep_their_names(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    file = write(tmp_path / "t.gguf", qwen(), "qwen2", add_chat_template=templates)
    found = tokenizer_files(file).tokenizer_config["chat_template"]
    assert {entry["name"]: entry["template"] for entry in found} == {"default": "d", "tool_use": "t"}


def test_llama3_puts_the_beginning_in_front_unless_told_otherwise(tmp_path: Path) -> None:
    assert tokenizer_files(write(tmp_path / "t.gguf", llama3(), "llama-bpe")).tokenizer_config["add_bos_token"] is True
    assert tokenizer_files(write(tmp_path / "u.gguf", gpt2(), None)).tokenizer_config["add_bos_token"] is False


def test_a_word_that_is_a_token_is_taken_whole_by_llama3_only(tmp_path: Path) -> None:
    for pre, count in (("llama-bpe", 1), ("deepseek-v3", 7)):
        made = tokenizer_files(write(tmp_path / f"{pre}.gguf", gpt2(), pre, extra=["Qwzxjky"], num_extra=1))
        assert len(Tokenizer.from_str(json.dumps(made.tokenizer)).encode("Qwzxjky").ids) == count


@pytest.mark.parametrize(
    ("pre", "more", "kind", "problem"),
    [
        ("qwen2", {"model": "llama"}, UnsupportedModelError, "tokenizer 'llama'"),
        ("martian", {}, UnsupportedModelError, "'martian'"),
        ("qwen2", {"extra": ["a"], "num_extra": 1}, CheckpointError, "'a' twice"),
        ("qwen2", {"extra": ["aa1"]}, CheckpointError, "types of"),
        ("qwen2", {"merges": ["a  b"]}, CheckpointError, "two parts"),
        ("qwen2", {"eos": 10**6}, CheckpointError, "eos token 1000000"),
    ],
)
def test_contradictions_are_refused(
    pre: str, more: dict[str, Any], kind: type[Exception], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=problem):
        tokenizer_files(write(tmp_path / "t.gguf", gpt2(), pre, **more))


def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens"):
        tokenizer_files(Gguf(tmp_path, {"tokenizer.ggml.model": "gpt2"}, {}))
