"""Which training examples hold what an evaluation is to ask: `find`.

Called when a run is prepared, which decides what is done about them. An evaluation example counts as leaked where the
training data has it whole, has its prompt, or shares long stretches with it. Stretches are n-grams of 13 tokens: GPT-3
looked for 13-grams of words and ignored those that more than ten documents hold ("Language Models are Few-Shot
Learners", arXiv 2005.14165, appendix C); PaLM counted an example as leaked by the share of its n-grams that were found
(arXiv 2204.02311, section 8). Both rules are kept, as chat markers, system prompts and the wording of a task occur in
both sets and give nothing away. Memory grows with the evaluation data only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from seamount.training.examples.example import Example
from seamount.training.shards.dataset import Dataset

Kind = Literal["example", "prompt", "overlap"]

_NGRAM = 13
_COMMON = 10  # an n-gram that more examples hold, of either set, gives nothing away
_LEAKED_SHARE = 0.5
_MOST_NAMED = 10  # training examples per evaluation example
_READ_TOKENS = 2**20  # at once
_FILTER_BITS = 24


@dataclass(frozen=True, slots=True)
class Leak:
    """A training example that gives an evaluation example away.

    Attributes:
        train, evaluation: numbers of the examples, from 0.
        kind: "example": the same tokens; "prompt": the same before the last answer; "overlap": shared stretches.
        share: of the evaluation example's telling 13-grams, those that the training example holds; 1 where they are
            the same.
    """

    train: int
    evaluation: int
    kind: Kind
    share: float

    def __str__(self) -> str:
        """Part of a sentence, with examples counted from 1."""
        what = {
            "example": "is",
            "prompt": "has the same prompt as",
            "overlap": f"shares {self.share:.0%} of its 13-token stretches with",
        }[self.kind]
        return f"evaluation example {self.evaluation + 1} {what} training example {self.train + 1}"


def find(train: Dataset, evaluation: Dataset) -> list[Leak]:
    """Leaks by evaluation example, then by training example; of each evaluation example at most ten are named.

    A pair is named once, as what it shares most; where there are more, resemblances give way. Prompts of one token,
    which plain text has, are not compared.
    """
    evaluated = [evaluation.example(index) for index in range(len(evaluation))]
    same = _Same(evaluated)
    overlap = _Overlap(evaluated)
    named: dict[tuple[int, int], Leak] = {}
    for first, examples in _blocks(train):
        for index, example in enumerate(examples, first):
            for leak in same.leaks(index, example):
                named[leak.evaluation, leak.train] = leak
        overlap.look_at(first, examples)
    for leak in overlap.leaks():
        named.setdefault((leak.evaluation, leak.train), leak)
    count = np.zeros(len(evaluated), dtype=np.int64)
    found = []
    for leak in sorted(named.values(), key=lambda leak: (leak.kind == "overlap", leak.train)):
        count[leak.evaluation] += 1
        if count[leak.evaluation] <= _MOST_NAMED:
            found.append(leak)
    return sorted(found, key=lambda leak: (leak.evaluation, leak.train))


class _Same:
    """Finds whole examples and prompts again."""

    def __init__(self, evaluated: list[Example]) -> None:
        self._wanted: dict[bytes, list[tuple[int, Kind]]] = {}
        self._num_named = np.zeros(len(evaluated), dtype=np.int64)
        for index, example in enumerate(evaluated):
            for key, kind in _keys(example):
                self._wanted.setdefault(key, []).append((index, kind))

    def leaks(self, train: int, example: Example) -> Iterator[Leak]:
        named: set[int] = set()
        for key, _ in _keys(example):  # the whole example first
            for index, kind in self._wanted.get(key, ()):
                if index not in named and self._num_named[index] < _MOST_NAMED:
                    named.add(index)
                    self._num_named[index] += 1
                    yield Leak(train, index, kind, 1.0)


def _keys(example: Example) -> list[tuple[bytes, Kind]]:
    """Digests of the example and of its prompt: what stands before the last trained stretch."""
    tokens = example.token_ids.astype("<i4")
    keys: list[tuple[bytes, Kind]] = [(_digest(b"example", tokens), "example")]
    begins = np.flatnonzero(example.trained[1:] & ~example.trained[:-1]) + 1
    if len(begins) and begins[-1] > 1:
        keys.append((_digest(b"prompt", tokens[: begins[-1]]), "prompt"))
    return keys


def _digest(kind: bytes, tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16, person=kind).digest()


class _Overlap:
    """Counts shared n-grams. The evaluation's distinct ones are sorted; each is known by its place there."""

    def __init__(self, evaluated: list[Example]) -> None:
        hashes, owners = _ngrams(evaluated)
        self._grams, places = np.unique(hashes, return_inverse=True)
        # Which evaluation example holds which n-gram, each pair once, sorted by n-gram.
        pairs = np.unique(np.stack([places, owners], axis=1), axis=0) if len(hashes) else np.zeros((0, 2), np.int64)
        self._holders, self._holder_starts = pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(len(self._grams) + 1))
        self._num_evaluated = len(evaluated)
        self._num_train = np.zeros(len(self._grams), dtype=np.int64)  # training examples that hold each
        self._hits: list[np.ndarray] = []  # of (n-gram, training example)
        self._filter = np.zeros(2**_FILTER_BITS, dtype=bool)
        self._filter[self._grams >> np.uint64(64 - _FILTER_BITS)] = True

    def look_at(self, first: int, examples: list[Example]) -> None:
        """Note which n-grams some training examples hold, of which the first has number `first`."""
        if not len(self._grams):
            return
        hashes, owners = _ngrams(examples)
        maybe = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])  # few need the search
        hashes, owners = hashes[maybe], owners[maybe]
        places = np.searchsorted(self._grams, hashes)
        known = np.flatnonzero(self._grams[np.minimum(places, len(self._grams) - 1)] == hashes)
        hits = np.unique(np.stack([places[known], owners[known] + first], axis=1), axis=0)
        hits = hits[self._num_train[hits[:, 0]] <= _COMMON]  # what is common already need not be kept
        self._num_train += np.bincount(hits[:, 0], minlength=len(self._grams))
        if len(hits):
            self._hits.append(hits)

    def leaks(self) -> list[Leak]:
        """The pairs that share enough of what is not common."""
        if not self._hits:
            return []
        num_holders = np.diff(self._holder_starts)
        telling = (self._num_train <= _COMMON) & (num_holders <= _COMMON)
        holds_telling = np.repeat(telling, num_holders)
        num_telling = np.bincount(self._holders[holds_telling], minlength=self._num_evaluated)
        hits = np.concatenate(self._hits)
        hits = hits[telling[hits[:, 0]]]
        repeats = num_holders[hits[:, 0]]
        # Each hit once per evaluation example that holds the n-gram.
        within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        evaluation = self._holders[np.repeat(self._holder_starts[hits[:, 0]], repeats) + within]
        pairs, counts = np.unique(
            np.stack([evaluation, np.repeat(hits[:, 1], repeats)], axis=1), axis=0, return_counts=True
        )
        shares = counts / num_telling[pairs[:, 0]]
        return [
            Leak(int(train), int(index), "overlap", float(share))
            for (index, train), share in zip(pairs, shares, strict=True)
            if share >= _LEAKED_SHARE
        ]


def _ngrams(examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all n-grams within examples, uint64, and the place of the example that holds each."""
    lengths = np.array([len(example.token_ids) for example in examples], dtype=np.int64)
    if lengths.sum() < _NGRAM:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    tokens = np.concatenate([example.token_ids for example in examples]).astype(np.uint64)
    tokens = (tokens + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    tokens ^= tokens >> np.uint64(32)
    num_windows = len(tokens) - _NGRAM + 1
    hashes = np.zeros(num_windows, dtype=np.uint64)
    for offset in range(_NGRAM):  # a polynomial in an odd number, modulo 2**64
        hashes = hashes * np.uint64(0xD6E8FEB86659FD93) + tokens[offset : offset + num_windows]
    hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)  # the filter looks at the high bits
    owners = np.repeat(np.arange(len(examples)), lengths)
    inside = np.flatnonzero(owners[:num_windows] == owners[_NGRAM - 1 :])
    return hashes[inside], owners[inside]


def _blocks(data: Dataset) -> Iterator[tuple[int, list[Example]]]:
    """All examples, about a million tokens at a time, with the number of each block's first."""
    examples: list[Example] = []
    first, num_tokens = 0, 0
    for index in range(len(data)):
        example = data.example(index)
        examples.append(example)
        num_tokens += len(example.token_ids)
        if num_tokens >= _READ_TOKENS:
            yield first, examples
            first, examples, num_tokens = index + 1, [], 0
    if examples:
        yield first, examples
