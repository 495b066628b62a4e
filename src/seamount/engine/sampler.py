"""Chooses tokens from logits, each row by itself: a row's result never depends on what else is in the batch.

Randomness comes from a counter, not from a generator with state: the uniform number of a token is a hash of the
sequence's seed and the token's position, so preemption, batching and restarts cannot change it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seamount import kernels
from seamount.core.sampling import SamplingParams

from .sequence import Sequence

_MASK = 2**64 - 1
# A first guess: what top_k and top_p keep weighs at least this, of the best one's weight. Where they keep more, the
# whole row is looked at.
_LIKELY = 1e-4


@dataclass(frozen=True, slots=True)
class Sample:
    """One chosen token; `top` holds (token id, log-probability), best first, when asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[Sample | None]:
    """Choose one token per row; None where the row is not finite, so that nothing can be chosen.

    Args:
        logits: `[N, V]` fp32, one row per sequence; not changed.
        sequences: N sequences, whose tokens so far decide penalties and randomness.
        eos_token_ids: tokens that `min_tokens` keeps from being chosen.
    """
    rows = zip(logits, sequences, likeliest(logits), strict=True)
    return [sample_row(row, sequence, eos_token_ids, best) for row, sequence, best in rows]


def choose(logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int | None]:
    """As `sample`, without log-probabilities."""
    rows = zip(logits, sequences, likeliest(logits), strict=True)
    return [None if best is None else _choose(row, sequence, eos_token_ids, best) for row, sequence, best in rows]


def likeliest(logits: Tensor) -> list[int | None]:
    """The likeliest token of each row of `[N, V]`; None where the row is not finite: a NaN becomes its maximum."""
    values, best = kernels.argmax(logits)
    pairs = zip(best.tolist(), values.tolist(), strict=True)
    return [token_id if math.isfinite(value) else None for token_id, value in pairs]


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on these three alone (SplitMix64, Steele et al., 2014)."""
    value = (seed * 0x9E3779B97F4A7C15 + index) & _MASK
    for word in (position, 0x632BE59BD9B4E019):
        value = (value + word * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return (value >> 11) / 2**53


def sample_row(row: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...], best: int | None) -> Sample | None:
    """As `sample`, for one row `[V]` whose `likeliest` is `best`."""
    if best is None:
        return None
    params = sequence.sampling
    token_id = _choose(row, sequence, eos_token_ids, best)
    if params.logprobs is None:
        return Sample(token_id)
    logprobs = row.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(params.logprobs, row.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sample(token_id, float(logprobs[token_id]), top)


def _choose(row: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...], best: int) -> int:
    params = sequence.sampling
    adjusted = _adjust(row, sequence, eos_token_ids)
    if params.greedy:
        return best if adjusted is row else int(adjusted.argmax())
    draw = uniform(sequence.seed, sequence.index, sequence.num_output_tokens)
    return _draw(adjusted, params, draw)


def _adjust(row: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> Tensor:
    """Apply bias, penalties, grammar and the end-of-sequence ban to a copy; with nothing to do, return the row."""
    params = sequence.sampling
    steps: list[Callable[[Tensor], None]] = []
    if params.logit_bias:
        steps.append(lambda r: _add_bias(r, params.logit_bias))
    if params.repetition_penalty != 1.0:
        steps.append(lambda r: _penalize_repetition(r, sequence.token_ids, params.repetition_penalty))
    if sequence.num_output_tokens and (params.frequency_penalty or params.presence_penalty):
        steps.append(lambda r: _penalize_counts(r, Counter(sequence.output_token_ids), params))
    banned = {*eos_token_ids, *params.stop_token_ids} if sequence.num_output_tokens < params.min_tokens else set()
    constraint = sequence.constraint
    if constraint is not None:
        # Going on past the end of a text means nothing to a grammar: it is not ended while there is another way.
        unwanted = {*banned, *eos_token_ids} if params.ignore_eos else banned
        steps.append(lambda r: _constrain(r, constraint.allowed, unwanted))
    elif banned:
        steps.append(lambda r: _ban(r, banned))
    if not steps:
        return row
    row = row.clone()
    for step in steps:
        step(row)
    return row


def _ban(row: Tensor, token_ids: set[int]) -> None:
    banned = [i for i in token_ids if i < row.shape[0]]
    if len(banned) < row.shape[0]:
        row[banned] = float("-inf")


def _constrain(row: Tensor, allowed: Tensor, unwanted: set[int]) -> None:
    """Leave what is allowed; of that, what is unwanted only where nothing else is left."""
    if unwanted:
        wanted = allowed.clone()
        wanted[[i for i in unwanted if i < row.shape[0]]] = False
        allowed = wanted if bool(wanted.any()) else allowed
    row.masked_fill_(~allowed.to(row.device), float("-inf"))


def _add_bias(row: Tensor, bias: dict[int, float]) -> None:
    row[list(bias)] += torch.tensor(list(bias.values()), dtype=row.dtype, device=row.device)


def _penalize_repetition(row: Tensor, token_ids: list[int], penalty: float) -> None:
    """Keskar et al., 2019 (CTRL): positive logits of seen tokens are divided, negative ones multiplied."""
    seen = torch.tensor(list(set(token_ids)), device=row.device)
    values = row[seen]
    row[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _penalize_counts(row: Tensor, counts: Counter[int], params: SamplingParams) -> None:
    ids = list(counts)
    times = torch.tensor([counts[i] for i in ids], dtype=row.dtype, device=row.device)
    row[ids] -= times * params.frequency_penalty + params.presence_penalty


def _draw(row: Tensor, params: SamplingParams, draw: float) -> int:
    """Take the candidate at which the cumulative weight, in the vocabulary's order, passes `draw`."""
    ids, weights = _kept(row, params)
    cumulative = weights.cumsum(dim=-1)
    place = int(torch.searchsorted(cumulative, cumulative[-1] * draw, right=True))
    return int(ids[min(place, int(weights.nonzero()[-1]))])


def _kept(row: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Ids, ascending, and weights of the tokens that min_p, top_k and top_p leave.

    By rank instead of by id, noise that swaps two near-equal candidates would shift all between them.
    """
    limited = 0 < params.top_k < row.shape[0] or params.top_p < 1.0
    for floor in (_LIKELY, 0.0) if limited and params.min_p <= 0 else (params.min_p,):
        ids, weights, total = kernels.candidates(row, params.temperature, floor)
        if _are_enough(weights, total, params):
            break
    if not limited:
        return ids, weights
    if params.min_p > 0:
        total = float(weights.sum())
    order = weights.argsort(descending=True, stable=True)
    if params.top_k > 0:
        order = order[: params.top_k]
        total = float(weights[order].sum())
    if params.top_p < 1.0:
        order = order[: int((weights[order].cumsum(dim=-1) < total * params.top_p).sum()) + 1]
    order = order.sort().values
    return ids[order], weights[order]


def _are_enough(weights: Tensor, total: float, params: SamplingParams) -> bool:
    """Whether the likeliest tokens include all that top_k or top_p keep: both take the best ones first."""
    return 0 < params.top_k <= weights.shape[0] or (
        params.top_p < 1.0 and params.top_k <= 0 and float(weights.sum()) >= total * params.top_p
    )
