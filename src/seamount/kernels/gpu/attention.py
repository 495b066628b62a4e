"""Attention over a paged cache on a GPU: what `reference` calls `paged_attention` and `latent_attention`.

Called by `models` by way of `kernels.choice`. When every sequence has one new token (T equals S), only the tensors of
`Pages` are read, so that a CUDA graph can replay the step. Never run on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from seamount.kernels.pages import Pages

from .flash import attend


def paged_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Pages, scale: float) -> Tensor:
    """See `reference.paged_attention`."""
    return attend(q, key_cache, value_cache, pages, scale)


def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    up_key: Tensor,
    up_value: Tensor,
    pages: Pages,
    scale: float,
) -> Tensor:
    """See `reference.latent_attention`."""
    operands = (latent_cache, up_key, up_value)
    only_decode = q_nope.shape[0] == pages.context_lens.shape[0]
    many = [] if only_decode else _with_many_tokens(up_key, up_value, pages.starts)
    if not many:
        return _absorbed(q_nope, q_rope, *operands, pages, scale)
    few = [s for s in range(len(pages.lengths)) if s not in many]
    if not few:
        return _expanded(q_nope, q_rope, *operands, pages, scale)
    out = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], up_value.shape[1])
    for chosen, method in ((few, _absorbed), (many, _expanded)):
        rows = torch.cat([torch.arange(pages.starts[s], pages.starts[s + 1]) for s in chosen]).to(q_nope.device)
        out[rows] = method(q_nope[rows], q_rope[rows], *operands, _choose(pages, chosen), scale)
    return out


def _with_many_tokens(up_key: Tensor, up_value: Tensor, starts: Sequence[int]) -> list[int]:
    """The sequences with so many new tokens that forming the keys and values of their context saves work.

    Multiplications per head, n new tokens, L context: absorbed n*L*(2R + Dr), expanded L*R*(Dn + Dv) +
    n*L*(Dn + Dr + Dv).
    """
    rank, widths = up_key.shape[2], up_key.shape[1] + up_value.shape[1]
    saved = 2 * rank - widths
    if saved <= 0:
        return []
    most_absorbed = rank * widths // saved
    return [s for s, (first, end) in enumerate(itertools.pairwise(starts)) if end - first > most_absorbed]


def _absorbed(
    q_nope: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    up_key: Tensor,
    up_value: Tensor,
    pages: Pages,
    scale: float,
) -> Tensor:
    rank = up_key.shape[2]
    # The products leave [H, T, ...]; the kernel and the next product read through strides.
    absorbed = torch.bmm(q_nope.transpose(0, 1), up_key).transpose(0, 1)
    latent, k_rope = latent_cache.split((rank, latent_cache.shape[1] - rank), dim=1)
    mixed = attend(absorbed, latent.unsqueeze(1), None, pages, scale, q2=q_rope, k2=k_rope)
    return torch.bmm(mixed.transpose(0, 1), up_value.transpose(1, 2)).transpose(0, 1)


def _expanded(
    q_nope: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    up_key: Tensor,
    up_value: Tensor,
    pages: Pages,
    scale: float,
) -> Tensor:
    """Gather the contexts block by block into a small cache of their own, with keys and values per head."""
    rank, size, device = up_key.shape[2], pages.block_size, latent_cache.device
    tables = [pages.blocks_of(s) for s in range(len(pages.lengths))]
    blocks = latent_cache.view(-1, size, latent_cache.shape[1]).index_select(0, torch.cat(tables))
    latent, k_rope = blocks.flatten(0, 1).split((rank, latent_cache.shape[1] - rank), dim=1)
    k_nope = torch.matmul(latent, up_key.transpose(1, 2)).transpose(0, 1)
    v = torch.matmul(latent, up_value.transpose(1, 2)).transpose(0, 1)
    firsts = list(itertools.accumulate(map(len, tables), initial=0))
    own = [range(first, end) for first, end in itertools.pairwise(firsts)]
    formed = Pages.of(own, pages.starts, pages.lengths, size, device)
    return attend(q_nope, k_nope, v, formed, scale, q2=q_rope, k2=k_rope)


def _choose(pages: Pages, chosen: Sequence[int]) -> Pages:
    """The pages of a batch that holds only some of the sequences."""
    device = pages.block_table.device
    counts = [pages.starts[s + 1] - pages.starts[s] for s in chosen]
    starts = tuple(itertools.accumulate(counts, initial=0))
    kept = torch.tensor(chosen, device=device)
    return Pages(
        pages.block_table[kept],
        torch.tensor(starts, dtype=torch.int32, device=device),
        pages.context_lens[kept],
        starts,
        tuple(pages.lengths[s] for s in chosen),
        pages.block_size,
    )
