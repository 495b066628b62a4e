"""Whatever stands in a file of training data, it becomes examples or typed errors that name it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.training.examples.formats import FORMATS, Format, recognise
from seamount.training.examples.reading import read_records
from seamount.training.examples.record import Record, RecordError
from seamount.training.examples.rendering import Renderer
from seamount.training.examples.stream import ExampleStream

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 你好"}]
FILES = {
    "d.jsonl": (json.dumps({"messages": TURNS}) + "\n" + json.dumps({"messages": TURNS, "id": 1})).encode(),
    "d.json": json.dumps([{"messages": TURNS}, {"prompt": "a", "completion": "b"}], indent=1).encode(),
    "d.csv": b'prompt,completion\n"a ""q""\nb",c\nd,e\n',
    "d.jsonl.gz": gzip.compress(json.dumps({"text": "plain"}).encode(), mtime=0),
}
TEXT = st.text(max_size=6) | st.sampled_from(
    ["user", "assistant", "tool", "<think>", "</think>", "<｜User｜>", "[]", "{}"]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGE_FIELDS = ["role", "content", "from", "value", "reasoning", "tool_calls", "function_call", "loss", "weight"]
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": JSON})}), max_size=2
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "x"]), "content": TEXT | JSON},
        optional={"tool_calls": CALLS | JSON, "reasoning_content": TEXT, "loss": JSON},
    )
    | st.dictionaries(st.sampled_from(MESSAGE_FIELDS), JSON, max_size=4),
    max_size=4,
)
FIELDS = [name for form in FORMATS for names in form.needs for name in names]
FIELDS += ["history", "system", "tools", "id", "images"]
RECORDS = st.dictionaries(st.sampled_from(FIELDS), JSON | MESSAGES, max_size=4) | st.fixed_dictionaries(
    {"messages": MESSAGES}, optional={"tools": JSON, "id": JSON}
)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    encoder = PromptEncoder.from_folder(locate_model("seamount-tiny"))
    yield Renderer(encoder, max_length=64)
    encoder.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def check_items(items: Iterator[Any]) -> None:
    for item in items:
        if isinstance(item, RecordError):
            assert item.reason
            assert "\n" not in item.where
        else:
            record, example = item
            assert isinstance(record, Record)
            assert 2 <= len(example.token_ids) <= 64
            assert example.trained.any()
            assert not example.trained[0]
            assert isinstance(example.token_ids, np.ndarray)


@given(
    name=st.sampled_from(sorted(FILES)),
    cuts=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_damaged_files(folder: Path, renderer: Renderer, name: str, cuts: list[tuple[int, bytes]]) -> None:
    content = FILES[name]
    for place, new in cuts:
        content = content[:place] + new + content[place + 1 :]
    (folder / name).write_bytes(content)
    for item in read_records(folder / name):
        assert isinstance(item, Record | RecordError)
    check_items(iter(ExampleStream(folder / name, renderer)))


@given(records=st.lists(RECORDS, max_size=4))
@settings(max_examples=120, deadline=None)
def test_random_records(renderer: Renderer, records: list[dict[str, Any]]) -> None:
    check_items(iter(ExampleStream(records, renderer)))


@given(value=RECORDS, form=st.sampled_from(FORMATS))
@settings(max_examples=120, deadline=None)
def test_random_records_of_any_format(value: dict[str, Any], form: Format) -> None:
    record = Record("item 1", 1, value)
    for read in (form.sample, lambda record: recognise([record]).sample(record)):
        try:
            sample = read(record)
            json.dumps([sample.messages, sample.tools], ensure_ascii=False).encode()
        except RecordError as error:
            assert error.reason
