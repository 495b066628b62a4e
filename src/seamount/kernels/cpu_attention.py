"""Attention over the paged cache, what comes right before it, and the choice of experts, in the compiled kernels.

Called by `models.layers` for batches with a cache on a CPU; each function means what its namesake in `reference` means.
Activations are fp32, caches fp32, fp16 or bf16. A row's result has the same bits whatever other rows are in the call,
however a prompt was cut into chunks, and wherever its blocks lie. Shapes are named as in `reference`.

Block numbers, slots and lengths are the engine's own and are not checked: a wrong one reads or writes foreign memory.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from .library import library
from .pages import Pages
from .recording import StepFunction, empty

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SOFTMAX, _SIGMOID = 0, 1

Angles = tuple[Tensor, Tensor]


class _Pages(ctypes.Structure):
    """`struct Pages` of native/attention.h; `memory` is what it points to."""

    memory: Pages

    _fields_ = [
        ("num_sequences", c_int64),
        ("block_table", c_void_p),
        ("table_stride", c_int64),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_size", c_int32),
    ]


class _Functions:
    """The library's entry points with their argument types set once."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        p, i, n, f = c_void_p, c_int32, c_int64, c_float
        pages = ctypes.POINTER(_Pages)
        self.attention = StepFunction(lib, "seamount_attention", p, n, p, n, p, n, i, pages, i, i, i, i, f, p, n)
        self.rotary_write = StepFunction(
            lib, "seamount_rotary_write", p, n, n, i, i, i, p, p, f, p, p, i, p, n, p, n, i, p
        )
        self.latent_write = StepFunction(
            lib, "seamount_latent_write", p, n, n, i, i, p, f, p, n, i, i, p, n, p, p, i, p, n, i, p
        )
        self.route = StepFunction(lib, "seamount_route", p, n, n, i, p, i, i, i, i, i, f, p, p)


_functions: _Functions | None = None
# All layers of a step attend over the same pages: the last ones stay described.
_described: tuple[Pages, _Pages] | None = None


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Pages, scale: float, out: Tensor | None = None
) -> Tensor:
    """Causal attention of new tokens to cached keys and values, their own included.

    Args:
        q: fp32 `[T, H, D]`; the heads of a token lie side by side, tokens may be further apart.
        key_cache: `[num_slots, K, D]`; value_cache: `[num_slots, K, Dv]`, of the same dtype, heads side by side.
        scale: positive.
        out: contiguous fp32 `[T, H, Dv]`, where the caller has memory for it.

    Returns:
        fp32 `[T, H, Dv]`.

    Raises:
        ValueError: shapes, dtypes or strides are none of these.
    """
    num_tokens, num_heads, width = q.shape
    _, num_kv_heads, value_width = value_cache.shape
    kind = _KINDS.get(key_cache.dtype)
    if q.dtype != torch.float32 or kind is None or value_cache.dtype != key_cache.dtype:
        raise ValueError(f"not fp32 and one float type: {q.dtype}, {key_cache.dtype}, {value_cache.dtype}")
    if key_cache.shape[1:] != (num_kv_heads, width) or num_heads % num_kv_heads or scale <= 0:
        shapes = [list(x.shape) for x in (q, key_cache, value_cache)]
        raise ValueError(f"queries, keys and values {shapes} with scale {scale} do not fit each other")
    if pages.starts and num_tokens != pages.starts[-1]:
        raise ValueError(f"{num_tokens} queries for pages of {pages.starts[-1]} tokens")
    _check_heads(q)
    _check_heads(key_cache)
    _check_heads(value_cache)
    if out is None:
        out = empty(num_tokens, num_heads, value_width)
    _entry().attention(
        *(q, q.stride(0), key_cache, key_cache.stride(0), value_cache, value_cache.stride(0), kind, _describe(pages)),
        *(num_heads, num_kv_heads, width, value_width, scale, out, num_heads * value_width),
    )
    return out


def absorbed_attention(q: Tensor, latent_cache: Tensor, rank: int, pages: Pages, scale: float, out: Tensor) -> Tensor:
    """Latent attention between its two up-projections: one key head `[R + Dr]` that is also, up to R, the value.

    Args:
        q: fp32 `[T, H, R + Dr]`: the query's unrotated part times the key up-projection, then its rotated part.
        latent_cache: `[num_slots, R + Dr]`.
        rank: R.
        out: contiguous fp32 `[T, H, R]`.

    Returns:
        `out`, to go through the value up-projection.
    """
    keys = latent_cache.unsqueeze(1)
    return paged_attention(q, keys, keys[..., :rank], pages, scale, out)


def rotate_and_cache(
    qkv: Tensor,
    num_heads: int,
    angles: Angles,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
) -> Tensor:
    """Normalise and rotate query and key heads; store keys and values.

    Args:
        qkv: fp32 `[T, H + 2K, D]`; its queries are rotated in place.
        angles: cos and sin, fp32 `[T, D/2]`.
        norms: fp32 weights `[D]` of the norms on each query and key head, or None.
        cache: keys and values `[num_slots, K, D]`; written at `slots`, int64 `[T]`.

    Returns:
        The rotated queries `[T, H, D]`, a view of `qkv`.
    """
    num_tokens, num_rows, width = qkv.shape
    keys, values = cache
    num_kv_heads = keys.shape[1]
    kind = _KINDS.get(keys.dtype)
    if qkv.dtype != torch.float32 or kind is None or values.dtype != keys.dtype:
        raise ValueError(f"projections must be fp32 and caches of one float type, not {qkv.dtype}, {keys.dtype}")
    if num_rows != num_heads + 2 * num_kv_heads or keys.shape[2] != width or values.shape[1:] != keys.shape[1:]:
        shapes = [list(x.shape) for x in (qkv, keys, values)]
        raise ValueError(f"projections, keys and values {shapes} with {num_heads} query heads do not fit each other")
    _check_angles(angles, num_tokens, width, slots)
    _check_heads(qkv)
    _check_heads(keys)
    _check_heads(values)
    q_norm, k_norm = (None, None) if norms is None else (_vector(norms[0], width), _vector(norms[1], width))
    _entry().rotary_write(
        *(qkv, qkv.stride(0), num_tokens, num_heads, num_kv_heads, width, q_norm, k_norm, eps, *angles, False),
        *(keys, keys.stride(0), values, values.stride(0), kind, slots),
    )
    return qkv[:, :num_heads]


def rotate_and_cache_latent(
    kv: Tensor,
    norm: Tensor,
    eps: float,
    q: Tensor,
    absorbed: Tensor,
    angles: Angles,
    latent_cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool,
) -> None:
    """Store normalised latents with their rotated keys; rotate queries into their place behind the absorbed part.

    Args:
        kv: fp32 `[T, R + Dr]`; its latents are normalised in place.
        norm: fp32 `[R]`.
        q: fp32 `[T, H, Dn + Dr]`.
        absorbed: fp32 `[T, H, R + Dr]`: its last Dr columns are written, the others left alone.
        angles: cos and sin, fp32 `[T, Dr/2]`; `interleaved` as in `reference.apply_rotary`.
        latent_cache: `[num_slots, R + Dr]`; written at `slots`, int64 `[T]`.
    """
    num_tokens, width = kv.shape
    rope_width = width - norm.shape[0]
    kind = _KINDS.get(latent_cache.dtype)
    if kv.dtype != torch.float32 or q.dtype != torch.float32 or absorbed.dtype != torch.float32 or kind is None:
        dtypes = [x.dtype for x in (kv, q, absorbed, latent_cache)]
        raise ValueError(f"latents and queries must be fp32 and the cache a float type, not {dtypes}")
    nope_width = q.shape[2] - rope_width
    fits = absorbed.shape == (num_tokens, q.shape[1], width) and q.shape[0] == num_tokens and nope_width >= 0
    if not fits or latent_cache.shape[1] != width or kv.stride(1) != 1 or latent_cache.stride(1) != 1:
        shapes = [list(x.shape) for x in (kv, q, absorbed, latent_cache)]
        raise ValueError(f"latents, queries, absorbed queries and cache {shapes} do not fit each other")
    _check_angles(angles, num_tokens, rope_width, slots)
    _check_heads(q)
    _check_heads(absorbed)
    rank = width - rope_width
    _entry().latent_write(
        *(kv, kv.stride(0), num_tokens, rank, rope_width, _vector(norm, rank), eps),
        *(q, q.stride(0), q.shape[1], nope_width, absorbed, absorbed.stride(0)),
        *(*angles, interleaved, latent_cache, latent_cache.stride(0), kind, slots),
    )


def route_softmax(
    logits: Tensor, num_chosen: int, *, num_groups: int, num_chosen_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`reference.route_softmax`: weights fp32 and ids int32, `[T, A]`; of equal scores the lowest index wins."""
    return _route(logits, None, _SOFTMAX, num_chosen, num_groups, num_chosen_groups, False, scale)


def route_sigmoid(
    logits: Tensor,
    bias: Tensor,
    num_chosen: int,
    *,
    num_groups: int,
    num_chosen_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`reference.route_sigmoid`: weights fp32 and ids int32, `[T, A]`; of equal scores the lowest index wins."""
    bias = _vector(bias, logits.shape[1])
    return _route(logits, bias, _SIGMOID, num_chosen, num_groups, num_chosen_groups, normalize, scale)


def _route(
    logits: Tensor,
    bias: Tensor | None,
    router: int,
    num_chosen: int,
    num_groups: int,
    num_chosen_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be fp32 with unit stride, not {logits.dtype} with {logits.stride()}")
    if not 0 < num_chosen <= num_experts or num_experts % num_groups or not 0 < num_chosen_groups <= num_groups:
        groups = f"{num_chosen_groups} of {num_groups} groups"
        raise ValueError(f"cannot choose {num_chosen} of {num_experts} experts from {groups}")
    weights, ids = empty(num_tokens, num_chosen), empty(num_tokens, num_chosen, dtype=torch.int32)
    _entry().route(
        *(logits, logits.stride(0), num_tokens, num_experts, bias, router),
        *(num_chosen, num_groups, num_chosen_groups, normalize, scale, weights, ids),
    )
    return weights, ids


def _entry() -> _Functions:
    global _functions
    if _functions is None:
        lib = library()
        if lib is None:
            raise RuntimeError("the compiled kernels are not there: ask library.why_missing()")
        _functions = _Functions(lib)
    return _functions


def _describe(pages: Pages) -> _Pages:
    global _described
    if _described is not None and _described[0] is pages:
        return _described[1]
    table = pages.block_table
    if table.dtype != torch.int32 or table.stride(1) != 1 or table.device.type != "cpu":
        raise ValueError(f"pages must lie on the CPU as int32, not on {table.device} as {table.dtype}")
    num_sequences = len(pages.context_lens)
    if len(pages.query_starts) != num_sequences + 1 or len(table) != num_sequences:
        raise ValueError(f"{len(table)} rows of blocks and {num_sequences} lengths do not describe one batch")
    found = _Pages(
        num_sequences,
        table.data_ptr(),
        table.stride(0),
        pages.query_starts.data_ptr(),
        pages.context_lens.data_ptr(),
        pages.block_size,
    )
    found.memory = pages
    _described = (pages, found)
    return found


def _check_heads(x: Tensor) -> None:
    """Heads of a token lie side by side."""
    stride = x.stride()
    if stride[2] != 1 or (stride[1] != x.shape[2] and x.shape[1] != 1):
        raise ValueError(f"heads of {list(x.shape)} do not lie side by side: strides {list(stride)}")


def _check_angles(angles: Angles, num_tokens: int, width: int, slots: Tensor) -> None:
    shape = (num_tokens, width // 2)
    for part in angles:
        if part.dtype != torch.float32 or part.shape != shape or not part.is_contiguous():
            raise ValueError(f"angles must be fp32, contiguous and {list(shape)}, not {part.dtype} {list(part.shape)}")
    if slots.dtype != torch.int64 or slots.shape != (num_tokens,) or not slots.is_contiguous():
        raise ValueError(f"slots must be int64 [{num_tokens}], not {slots.dtype} {list(slots.shape)}")


def _vector(x: Tensor, size: int) -> Tensor:
    """x, which must be an fp32 vector of this size."""
    if x.dtype != torch.float32 or x.shape != (size,) or not x.is_contiguous():
        raise ValueError(f"expected {size} contiguous fp32 numbers, not {x.dtype} {list(x.shape)}")
    return x
