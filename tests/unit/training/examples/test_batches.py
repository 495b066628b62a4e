"""Records out of Python: lists, generators and torch's DataLoader, however it joins them."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader

from seamount.training.examples.reading import read_records
from seamount.training.examples.record import Record, RecordError


def chat(number: int) -> dict[str, Any]:
    turns = [("user", f"question {number}"), ("assistant", f"answer {number}")]
    return {"id": number, "messages": [{"role": role, "content": text} for role, text in turns]}


CHATS = [chat(number) for number in range(5)]


def together(batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in batch] for name in batch[0]}


@pytest.mark.parametrize(
    "source",
    [
        CHATS,
        tuple(CHATS),
        (row for row in CHATS),
        DataLoader(CHATS, batch_size=2, collate_fn=list),
        DataLoader(CHATS, batch_size=2, collate_fn=together),
        DataLoader(CHATS, batch_size=2),
        DataLoader(CHATS, batch_size=1),
        DataLoader(CHATS, batch_size=None),
    ],
    ids=["list", "tuple", "generator", "lists", "dicts of lists", "joined by torch", "batches of one", "no batches"],
)
def test_every_iterable_of_dicts_gives_its_records(source: Any) -> None:
    found = list(read_records(source))
    assert [item.value for item in found if isinstance(item, Record)] == CHATS
    assert [item.where for item in found] == [f"item {number}" for number in range(1, 6)]


def test_what_is_no_dict_is_told() -> None:
    found = list(read_records([{"text": "x"}, "text", 5]))
    assert [isinstance(item, RecordError) for item in found] == [False, True, True]
    assert found[1].reason == "is no dict but str"


def test_batches_that_are_no_table_are_one_record_of_unknown_form() -> None:
    (found,) = read_records(DataLoader([1], batch_size=1, collate_fn=lambda _: {"a": [1], "b": [1, 2]}))
    assert isinstance(found, Record)
    assert found.value == {"a": [1], "b": [1, 2]}
