"""Packs a step's examples into micro-batches of bounded size, and shares these over ranks: `pack`.

Called by the trainer, once per step and rank, with the same examples on every rank; nothing is sent between them. In a
micro-batch examples lie one after the other, each with positions from 0 and attending only to itself, so that the loss
is that of the examples alone and no token is padding. It must not know where examples come from, or what is
computed of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
import torch
from torch import Tensor

from seamount.models.batch import Batch
from seamount.training.examples.example import Example


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Several examples, one after the other; T tokens, S examples.

    Attributes:
        token_ids: `[T]` int64.
        positions: `[T]` int64, from 0 in each example.
        starts: S + 1 offsets; example s owns tokens `starts[s]:starts[s + 1]` and attends to no others.
        trained: `[T]` bool: the loss counts the guess of this token. Never True at a start.
        indices: the S examples' numbers in the data set.
        is_filler: a repeat in which nothing is trained, so that this rank computes as often as the others: it counts
            for nothing, neither in the loss nor as a use of its examples.
    """

    token_ids: Tensor
    positions: Tensor
    starts: tuple[int, ...]
    trained: Tensor
    indices: tuple[int, ...]
    is_filler: bool = False

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        if device.type == "cpu":
            return self
        moved = [tensor.to(device, non_blocking=True) for tensor in (self.token_ids, self.positions, self.trained)]
        token_ids, positions, trained = moved
        return MicroBatch(token_ids, positions, self.starts, trained, self.indices, self.is_filler)

    def batch(self) -> Batch:
        """What the network's `forward` takes; there is no cache."""
        return Batch(self.token_ids, self.positions, self.starts)


def pack(
    examples: Sequence[tuple[int, Example]], *, micro_tokens: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """The micro-batches of one rank for a step's examples, given as (number in the data set, example).

    Every example is in exactly one micro-batch of exactly one rank, fillers aside. All ranks get about as many tokens,
    and equally many micro-batches, the largest first. The result depends on nothing but the arguments.

    Args:
        micro_tokens: most tokens of a micro-batch; a longer example is a micro-batch of its own.
    """
    if micro_tokens < 1 or not 0 <= rank < world_size:
        raise ValueError(f"micro_tokens {micro_tokens}, rank {rank} of {world_size}")
    lengths = [len(example.token_ids) for _, example in examples]
    longest_first = sorted(range(len(examples)), key=lambda place: (-lengths[place], place))
    bins_of_ranks = [_fill_bins(share, lengths, micro_tokens) for share in _share(longest_first, lengths, world_size)]
    wanted = max(map(len, bins_of_ranks))
    mine = _split_to(wanted, bins_of_ranks[rank], lengths)
    mine.sort(key=lambda bin_: (-sum(lengths[place] for place in bin_), bin_))
    found = [_micro_batch([examples[place] for place in bin_]) for bin_ in mine]
    if len(found) < wanted:
        found += [_filler(examples[longest_first[-1]])] * (wanted - len(found))
    return found


def _share(longest_first: Sequence[int], lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal examples out, the longest first, each to the share with the fewest tokens (Graham's LPT rule, 1969)."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [(0, number) for number in range(num_shares)]  # a heap
    for place in longest_first:
        total, number = totals[0]
        shares[number].append(place)
        heapreplace(totals, (total + lengths[place], number))
    return shares


def _fill_bins(longest_first: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Bins of at most `room` tokens: each example goes into the fullest bin that can take it.

    Best-fit decreasing. It needs at most 11/9 of the fewest bins, as first-fit decreasing does (Johnson et al., SIAM J.
    Comput. 3, 1974), and finds a bin by bisection.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, bin), sorted
    for place in longest_first:
        length = lengths[place]
        found = bisect_left(rooms, (length, -1))
        if found < len(rooms):
            left, chosen = rooms.pop(found)
            bins[chosen].append(place)
        else:
            left, chosen = max(room, length), len(bins)
            bins.append([place])
        insort(rooms, (left - length, chosen))
    return bins


def _split_to(wanted: int, bins: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Halve the fullest bin that holds several examples until there are `wanted` bins, or none can be halved."""
    bins = list(bins)
    while len(bins) < wanted:
        divisible = [bin_ for bin_ in bins if len(bin_) > 1]
        if not divisible:
            break
        chosen = max(divisible, key=lambda bin_: sum(lengths[place] for place in bin_))
        bins.remove(chosen)
        bins += _share(chosen, lengths, 2)
    return bins


def _micro_batch(examples: Sequence[tuple[int, Example]]) -> MicroBatch:
    lengths = [len(example.token_ids) for _, example in examples]
    starts = (0, *np.cumsum(lengths).tolist())
    return MicroBatch(
        token_ids=torch.from_numpy(np.concatenate([example.token_ids for _, example in examples]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])),
        starts=starts,
        trained=torch.from_numpy(np.concatenate([example.trained for _, example in examples])),
        indices=tuple(index for index, _ in examples),
    )


def _filler(example: tuple[int, Example]) -> MicroBatch:
    whole = _micro_batch([example])
    return MicroBatch(
        whole.token_ids, whole.positions, whole.starts, torch.zeros_like(whole.trained), whole.indices, is_filler=True
    )
