"""Calibration files of every form are read, and broken ones are refused with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seamount.core.errors import ConfigError
from seamount.models.prompt import PromptEncoder
from seamount.training.compression.calibration import read_samples

LIMITS = {"num_samples": 8, "sample_tokens": 100, "shortest": 3}


@pytest.fixture
def encoder(small_checkpoint: Path) -> PromptEncoder:
    """A tokenizer of bytes, and a template."""
    return PromptEncoder.from_folder(small_checkpoint)


def file_of(folder: Path, content: str | bytes, name: str = "texts") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_each_line_is_a_sample_cut_to_the_limit(tmp_path: Path, encoder: PromptEncoder) -> None:
    path = file_of(tmp_path, "a" * 70 + "\r\n\n" + "b" * 500 + "\n" + "cd\n" + "d" * 120)
    samples = read_samples(path, encoder, **LIMITS)
    assert [len(sample) for sample in samples] == [70, 100, 100]
    assert encoder.decode(samples[0]) == "a" * 70


def test_samples_are_spread_over_the_file(tmp_path: Path, encoder: PromptEncoder) -> None:
    path = file_of(tmp_path, "\n".join(f"{number:>50}" for number in range(80)))
    samples = read_samples(path, encoder, **LIMITS)
    assert [int(encoder.decode(sample)) for sample in samples] == list(range(0, 80, 10))


def test_json_lines_hold_text_or_conversations(tmp_path: Path, encoder: PromptEncoder) -> None:
    messages = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]
    lines = [{"text": "t" * 100, "source": "book"}, {"messages": messages}]
    path = file_of(tmp_path, "\n".join(json.dumps(line) for line in lines))
    first, second = read_samples(path, encoder, **{**LIMITS, "sample_tokens": 500})
    assert encoder.decode(first) == "t" * 100
    assert encoder.decode(second) == f"user: {'x' * 200}\nassistant: y\nassistant: "


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("  \n\n", "is empty"),
        ("short\n", "gives 5 tokens"),
        (b"fine\nb\xff\xfe\n", "not UTF-8 text: see line 2"),
        (b"a\0b" * 200, "holds zero bytes"),
        ('{"text": "' + "x" * 300 + '"}\nplain', "line 2 is not valid JSON"),
        ('{"prompt": "x"}', "line 1 has neither text nor messages"),
        ('{"text": 5}', "line 1: The field text holds a number"),
        ('{"messages": [{"role": "user"}]}', "line 1: messages[0] has no content"),
        ('{"messages": "hello"}', "line 1: messages must be a list"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_what_is_broken_is_refused_by_line(
    tmp_path: Path, encoder: PromptEncoder, content: str | bytes, said: str
) -> None:
    name = "texts.jsonl" if isinstance(content, str) and content.startswith("[") else "texts"
    with pytest.raises(ConfigError) as refused:
        read_samples(file_of(tmp_path, content, name), encoder, **LIMITS)
    assert said in refused.value.message
    assert refused.value.hint


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, encoder: PromptEncoder) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_samples(path, encoder, **LIMITS)
