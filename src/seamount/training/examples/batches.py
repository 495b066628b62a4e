"""Items out of iterables, torch's DataLoader included, whose batches come apart again. Called by `reading`.

A DataLoader gives lists of dicts, dicts of lists, or what its own way of joining samples makes of nested ones
(`torch.utils.data.default_collate`): dicts inside stay, and every value in them is a list over the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def items_of(source: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of an iterable; of a DataLoader those in its batches."""
    if not _is_loader(source):
        yield from source
        return
    for batch in source:
        if isinstance(batch, Mapping) and getattr(source, "batch_size", None) is not None:
            yield from _rows(batch)
        elif isinstance(batch, list | tuple):
            yield from batch
        else:
            yield batch


def _is_loader(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("dataset", "batch_size", "collate_fn"))


def _rows(batch: Mapping[Any, Any]) -> Iterator[Any]:
    columns = {key: _column(value) for key, value in batch.items()}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        yield batch  # no table: told as a record of unknown form
        return
    for row in range(lengths.pop()):
        yield {key: column[row] for key, column in columns.items()}


def _column(value: Any) -> list[Any]:
    """Return one value per row of the batch."""
    if hasattr(value, "tolist"):
        found = value.tolist()
        return found if isinstance(found, list) else [found]
    if isinstance(value, Mapping):
        return list(_rows(value))
    if isinstance(value, list | tuple) and value and all(map(_is_joined, value)):
        turns = [_column(turn) for turn in value]
        if len({len(turn) for turn in turns}) == 1:
            return [list(conversation) for conversation in zip(*turns, strict=True)]
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_joined(value: Any) -> bool:
    """Whether a value is a dict whose values are each a list over the batch, as default_collate leaves it."""
    return isinstance(value, Mapping) and all(
        isinstance(inner, list | tuple | Mapping) or hasattr(inner, "tolist") for inner in value.values()
    )
