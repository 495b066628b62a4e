"""The examples that a recipe speaks of: read, rendered, checked, split, compared with those held out.

Called by `pipeline`. Small files become examples in memory; what `seamount data build` made is mapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from seamount.core.errors import ConfigError
from seamount.models.prompt import PromptEncoder
from seamount.training.examples.example import Example
from seamount.training.examples.load import load
from seamount.training.examples.rendering import Renderer
from seamount.training.shards import store
from seamount.training.shards.dataset import Dataset, ExampleList, TokenShards
from seamount.training.shards.leaks import find

from .recipe import DataSection

Records = Path | tuple[Path, ...] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run learns from.

    Attributes:
        train, evaluation: the examples; `evaluation` is None where none are held out.
        facts: counts and digests, for the report.
    """

    train: Dataset
    evaluation: Dataset | None
    facts: dict[str, Any] = field(default_factory=dict)


def renderer(section: DataSection, encoder: PromptEncoder) -> Renderer:
    """What turns the recipe's records into examples."""
    return Renderer(encoder, max_length=section.max_length, train_on=section.train_on, thinking=section.thinking)


def prepare(
    section: DataSection, encoder: PromptEncoder, seed: int, *, train: Records | None = None, evaluation: Any = None
) -> Prepared:
    """Make the examples of a run.

    Args:
        train, evaluation: records that are handed over in place of the recipe's files.

    Raises:
        ConfigError: there is no data, or evaluation examples occur in the training data.
        RecordError: a record is bad; names row, field and reason.
    """
    source: Records = section.train if train is None else train
    if source == ():
        raise ConfigError("The recipe names no training data.", hint="Set data.train to a file, or to several.")
    render = renderer(section, encoder)
    data, facts = _read(source, render, section)
    held_out: Dataset | None = None
    given = section.evaluation if evaluation is None else evaluation
    if given != ():
        held_out, _ = _read(given, render, section)
    elif section.evaluation_share:
        data, held_out = _split(data, section.evaluation_share, seed)
    facts |= _counts("train", data) | ({} if held_out is None else _counts("evaluation", held_out))
    if held_out is not None:
        found = find(data, held_out)
        leaks = [leak for leak in found if leak.kind != "overlap"]  # examples of one task resemble each other
        num_leaked = len({leak.evaluation for leak in leaks})
        facts["evaluation"] |= {"leaked": num_leaked, "resembling": len({leak.evaluation for leak in found})}
        if leaks and section.leaks == "refuse":
            raise ConfigError(
                f"{num_leaked} evaluation examples occur in the training data: {leaks[0]}.",
                hint="Take them out, or set data.leaks: allow; the measured accuracy then says little.",
            )
    return Prepared(data, held_out, facts)


def _read(source: Any, render: Renderer, section: DataSection) -> tuple[Dataset, dict[str, Any]]:
    paths = (source,) if isinstance(source, Path) else source
    if isinstance(paths, tuple) and len(paths) == 1 and _holds_shards(Path(paths[0])):
        shards = TokenShards.open(Path(paths[0]), renderer=render.digest)
        return shards, {"shards": str(paths[0])}
    found = load(paths, render, overlong=section.overlong, language=section.language)
    examples: list[Example] = found.examples
    facts: dict[str, Any] = {"overlong": {"cut": found.counts.num_cut, "left_out": found.counts.num_skipped}}
    if section.duplicates == "drop":
        kept = {(e.token_ids.tobytes(), e.trained.tobytes()): e for e in examples}
        facts["duplicates_dropped"] = len(examples) - len(kept)
        examples = list(kept.values())
    return ExampleList(examples), facts


def _holds_shards(folder: Path) -> bool:
    """Whether `seamount data build` made this folder, or began to; any other folder is one of files."""
    return any((folder / name).exists() for name in (store.MANIFEST, store.UNFINISHED))


def _split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Keep a part of the data apart, the same one for the same data and seed."""
    count = max(round(len(data) * share), 1)
    if count >= len(data):
        raise ConfigError(f"data.evaluation_share {share} leaves none of {len(data)} examples to train on.")
    order = np.random.default_rng([seed, len(data)]).permutation(len(data))
    held_out, rest = sorted(order[:count].tolist()), sorted(order[count:].tolist())
    return _Subset(data, rest), _Subset(data, held_out)


class _Subset(ExampleList):
    def __init__(self, data: Dataset, chosen: list[int]) -> None:
        super().__init__([data.example(index) for index in chosen])


def _counts(name: str, data: Dataset) -> dict[str, Any]:
    return {
        name: {
            "examples": len(data),
            "tokens": int(data.lengths.sum()),
            "trained_tokens": int(data.num_trained.sum()),
            "longest": int(data.lengths.max()),
            "digest": data.digest,
        }
    }
