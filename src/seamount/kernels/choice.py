"""Picks an implementation where there are several. Each function means what its namesake in `reference` means."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import cpu_attention, differentiable, packed, ragged, reference
from .library import library
from .packed import PackedStack
from .pages import Pages
from .recording import empty, is_recording

# Sequences up to this many tokens are attended without the fused kernel when gradients flow on a CPU.
_SHORT_TOKENS = 512
# Below it the reciprocal is no fp32 number.
_LEAST_TEMPERATURE = 1e-30


def _compiled(x: Tensor) -> bool:
    """Whether the compiled CPU kernels take this: they compute in fp32 and know no gradients."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and x.requires_grad)
        and library() is not None
    )


# Between two layers nothing of these is needed: fresh memory for each, page by page, would cost more than the work.
_workspaces: dict[str, Tensor] = {}


def _workspace(name: str, *shape: int) -> Tensor:
    if is_recording():
        return empty(*shape)
    size = math.prod(shape)
    held = _workspaces.get(name)
    if held is None or held.numel() < size:
        held = _workspaces[name] = torch.empty(size)
    return held[:size].view(shape)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels take this: they know no gradients."""
    return x.is_cuda and not torch.is_grad_enabled() and _has_triton()


def can_capture(device: torch.device) -> bool:
    """Whether decode steps on this device can become CUDA graphs: the Triton kernels read nothing of the host."""
    return device.type == "cuda" and _has_triton()


@cache
def _gpu() -> ModuleType:
    """The Triton kernels, imported when the first tensor on a GPU comes: Triton takes a second to import."""
    return importlib.import_module("seamount.kernels.gpu")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if _on_gpu(x):
        return _gpu().rms_norm(x, weight, eps)
    if x.dim() == 2 and weight.dtype == torch.float32 and not weight.requires_grad and _compiled(x):
        return packed.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def join_norms(x: Tensor, x_weight: Tensor, y: Tensor, y_weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of x and of y `[T, C]`, side by side: `[T, 2C]`."""
    if not x_weight.requires_grad and _compiled(x) and _compiled(y):
        num_tokens, width = x.shape
        out = empty(num_tokens, 2 * width)
        packed.rms_norm(x, x_weight, eps, out[:, :width])
        packed.rms_norm(y, y_weight, eps, out[:, width:])
        return out
    return torch.cat((rms_norm(x, x_weight, eps), rms_norm(y, y_weight, eps)), dim=-1)


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value `[N]` of each row of `x [N, V]` and its index `[N]`; a NaN anywhere is the row's largest value."""
    if x.stride(1) == 1 and _compiled(x):
        return packed.argmax(x)
    values, indices = x.max(dim=-1)
    return values, indices


def candidates(row: Tensor, temperature: float, floor: float) -> tuple[Tensor, Tensor, float]:
    """What a token is drawn from: weights `e^((x - best) / temperature)` of a row of logits.

    Args:
        row: fp32 `[V]`, its best one finite.
        temperature: positive.
        floor: columns of less weight are left out; the best one weighs 1.

    Returns:
        ids `[K]`, ascending; their weights `[K]`, fp64; and the sum of all weights, those left out included.
    """
    best = float(row.max())
    if row.stride(0) == 1 and temperature > _LEAST_TEMPERATURE and _compiled(row):
        return packed.candidates(row, best, temperature, floor)
    weights = ((row - best).double() / temperature).exp()
    ids = (weights >= floor).nonzero().squeeze(1)
    return ids, weights[ids], float(weights.sum())


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """See `reference.causal_attention`."""
    if torch.is_grad_enabled() and q.requires_grad and q.device.type == "cpu":
        if not torch.compiler.is_compiling():
            return ragged.causal_attention(q, k, v, starts, scale)
        lengths = {end - start for start, end in itertools.pairwise(starts)}
        if q.shape[1] == k.shape[1] and len(lengths) == 1 and max(lengths) <= _SHORT_TOKENS:
            return differentiable.causal_attention(q, k, v, starts, scale)
    return reference.causal_attention(q, k, v, starts, scale)


def rotate_and_cache(
    qkv: Tensor,
    num_heads: int,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
) -> Tensor:
    """See `reference.rotate_and_cache`."""
    if _on_gpu(qkv):
        return _gpu().rotate_and_cache(qkv, num_heads, angles, norms, eps, cache, slots)
    if _compiled(qkv):
        return cpu_attention.rotate_and_cache(qkv, num_heads, angles, norms, eps, cache, slots)
    return reference.rotate_and_cache(qkv, num_heads, angles, norms, eps, cache, slots)


def paged_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Pages, scale: float) -> Tensor:
    """See `reference.paged_attention`."""
    if _on_gpu(q):
        return _gpu().paged_attention(q, key_cache, value_cache, pages, scale)
    if _compiled(q):
        return cpu_attention.paged_attention(q, key_cache, value_cache, pages, scale)
    return reference.paged_attention(q, key_cache, value_cache, pages, scale)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    return _gpu().swiglu(gate_up) if _on_gpu(gate_up) else reference.swiglu(gate_up)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """See `reference.apply_rotary`."""
    rotary = _gpu().apply_rotary if _on_gpu(x) else reference.apply_rotary
    return rotary(x, cos, sin, interleaved=interleaved)


def write_cache(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    """See `reference.write_cache`."""
    (_gpu().write_cache if _on_gpu(cache) else reference.write_cache)(cache, slots, values)


def latent_rotate_and_cache(
    q_rope: Tensor,
    compressed: Tensor,
    weight: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool,
) -> Tensor:
    """See `reference.latent_rotate_and_cache`."""
    chosen = _gpu().latent_rotate_and_cache if _on_gpu(compressed) else reference.latent_rotate_and_cache
    return chosen(q_rope, compressed, weight, eps, angles, cache, slots, interleaved=interleaved)


def cache_latent(
    compressed: Tensor,
    weight: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool,
) -> None:
    """What `reference.latent_rotate_and_cache` writes, where nothing is asked of what was written."""
    if _compiled(compressed):
        num_tokens, width = compressed.shape
        rotated = width - weight.shape[0]
        no_queries = (compressed.new_empty(num_tokens, 0, rotated), compressed.new_empty(num_tokens, 0, width))
        cpu_attention.rotate_and_cache_latent(
            compressed, weight, eps, *no_queries, angles, cache, slots, interleaved=interleaved
        )
        return
    latent, key = compressed.split((weight.shape[0], compressed.shape[1] - weight.shape[0]), dim=-1)
    latent = rms_norm(latent.contiguous(), weight, eps)
    key = apply_rotary(key.unsqueeze(1), *angles, interleaved=interleaved).squeeze(1)
    write_cache(cache, slots, torch.cat((latent, key), dim=-1))


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
    chosen = _gpu().latent_attention if _on_gpu(q_nope) else reference.latent_attention
    return chosen(q_nope, q_rope, latent_cache, up_key, up_value, pages, scale)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.router_logits`."""
    return _gpu().router_logits(x, weight) if _on_gpu(x) else reference.router_logits(x, weight)


def packed_latent_attention(
    q: Tensor,
    compressed: Tensor,
    norm_weight: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    up: tuple[PackedStack, PackedStack],
    latent_cache: Tensor,
    slots: Tensor,
    pages: Pages,
    scale: float,
    *,
    interleaved: bool,
) -> Tensor:
    """Latent attention with packed up-projections: cache the new latents, attend absorbed, expand what comes out.

    Args:
        q: fp32 `[T, H, Dn + Dr]`, not yet rotated; compressed: fp32 `[T, R + Dr]`, neither normed nor rotated.
        norm_weight: fp32 `[R]`, with `eps`: the norm of the latent.
        up: per head `[R, Dn]`, from queries to latents; and `[Dv, R]`, from latents to values.
        latent_cache: `[num_slots, R + Dr]`, written at `slots [T]`.

    Returns:
        `[T, H, Dv]`.
    """
    to_latent, to_value = up
    num_tokens, num_heads, rank = q.shape[0], q.shape[1], norm_weight.shape[0]
    absorbed = _workspace("absorbed", num_tokens, num_heads, latent_cache.shape[1])
    to_latent.multiply_heads(q, absorbed)
    cpu_attention.rotate_and_cache_latent(
        compressed, norm_weight, eps, q, absorbed, angles, latent_cache, slots, interleaved=interleaved
    )
    mixed = _workspace("mixed", num_tokens, num_heads, rank)
    cpu_attention.absorbed_attention(absorbed, latent_cache, rank, pages, scale, out=mixed)
    out = empty(num_tokens, num_heads, to_value.matrices[0].num_outputs)
    to_value.multiply_heads(mixed, out)
    return out


def route_softmax(
    logits: Tensor, num_chosen: int, *, num_groups: int, num_chosen_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.route_softmax`."""
    if _on_gpu(logits):
        return _gpu().route_softmax(
            logits, num_chosen, num_groups=num_groups, num_chosen_groups=num_chosen_groups, scale=scale
        )
    if _compiled(logits):
        return cpu_attention.route_softmax(
            logits, num_chosen, num_groups=num_groups, num_chosen_groups=num_chosen_groups, scale=scale
        )
    return reference.route_softmax(
        logits, num_chosen, num_groups=num_groups, num_chosen_groups=num_chosen_groups, scale=scale
    )


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
    """See `reference.route_sigmoid`."""
    if _on_gpu(logits):
        return _gpu().route_sigmoid(
            logits,
            bias,
            num_chosen,
            num_groups=num_groups,
            num_chosen_groups=num_chosen_groups,
            normalize=normalize,
            scale=scale,
        )
    if _compiled(logits):
        return cpu_attention.route_sigmoid(
            logits,
            bias,
            num_chosen,
            num_groups=num_groups,
            num_chosen_groups=num_chosen_groups,
            normalize=normalize,
            scale=scale,
        )
    return reference.route_sigmoid(
        logits,
        bias,
        num_chosen,
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        normalize=normalize,
        scale=scale,
    )


def run_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, add_to: Tensor | None = None
) -> Tensor:
    """See `reference.run_experts`; the sum is added to `add_to [T, C]` where that is given."""
    if _on_gpu(x):
        return _gpu().run_experts(x, weights, ids, gate_up, down, add_to)
    if torch.is_grad_enabled() and (x.requires_grad or gate_up.requires_grad):
        out = differentiable.run_experts(x, weights, ids, gate_up, down)
    else:
        out = reference.run_experts(x, weights, ids, gate_up, down)
    return out if add_to is None else add_to + out


def run_packed_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: PackedStack, down: PackedStack, *, add_to: Tensor
) -> Tensor:
    """`reference.run_experts` with packed weights, added to `add_to [T, C]` in place, which is returned."""
    packed.run_packed_experts(x, weights, ids.to(torch.int32), gate_up, down, add_to)
    return add_to
