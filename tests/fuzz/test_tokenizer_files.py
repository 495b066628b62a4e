"""Damaged tokenizer folders give a working encoder or a typed error, never another exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seamount.core.errors import SeamountError
from seamount.models.prompt import PromptEncoder

NAMES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "chat_template.json")
VALUES = st.sampled_from(
    [None, True, -1, 0, 1.5, 2**63, 10**30, "", "x", "<|a|>", [], ["x"], {}, {"type": "BPE"}, [[]]]
)


def good() -> dict[str, str]:
    tokenizer = Tokenizer(
        models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    contents = {
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": "{{ messages }}"},
        "config.json": {"model_type": "qwen2", "vocab_size": 300, "eos_token_id": 257},
        "generation_config.json": {"eos_token_id": [257], "temperature": 0.6},
        "chat_template.json": {"chat_template": "x"},
    }
    return {"tokenizer.json": tokenizer.to_str(), **{name: json.dumps(value) for name, value in contents.items()}}


GOOD = good()


def use(folder: Path) -> None:
    """Do without templates what a server does with a folder."""
    try:
        encoder = PromptEncoder.from_folder(folder)
        ids = encoder.encode_text("hello 你好 <|im_start|>")
        assert isinstance(encoder.decode(ids), str)
        assert isinstance(encoder.token_text(3), str)
    except SeamountError:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


def write(folder: Path, changed: str, content: bytes) -> None:
    for name, text in GOOD.items():
        (folder / name).write_bytes(content if name == changed else text.encode())


@given(name=st.sampled_from(NAMES), start=st.integers(0, 10**6), length=st.integers(0, 40), new=st.binary(max_size=12))
@settings(max_examples=200, deadline=None)
def test_overwritten_bytes(folder: Path, name: str, start: int, length: int, new: bytes) -> None:
    content = GOOD[name].encode()
    start %= len(content)
    write(folder, name, content[:start] + new + content[start + length :])
    use(folder)


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Return the way to every value in a JSON document, the character table's entries left out."""
    if isinstance(value, dict):
        keys = list(value)[:20]
    else:
        keys = list(range(min(len(value), 20))) if isinstance(value, list) else []
    return [(key,) for key in keys] + [(key, *rest) for key in keys for rest in paths(value[key])]


@given(name=st.sampled_from(NAMES), which=st.integers(0, 10**6), value=VALUES, delete=st.booleans())
@settings(max_examples=300, deadline=None)
def test_changed_and_missing_fields(folder: Path, name: str, which: int, value: Any, delete: bool) -> None:
    document = json.loads(GOOD[name])
    ways = paths(document)
    *way, last = ways[which % len(ways)]
    parent = document
    for key in way:
        parent = parent[key]
    if delete:
        del parent[last]
    else:
        parent[last] = value
    write(folder, name, json.dumps(document).encode())
    use(folder)
