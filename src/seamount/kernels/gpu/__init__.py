"""The kernels for CUDA GPUs, in Triton, under the names that `kernels` has for their meaning.

`kernels.choice` picks them for tensors on a GPU where no gradients flow; nothing else imports this package, because it
imports Triton. Operations without a kernel here are the reference's. `add_rms_norm`, `latent_rotate_and_cache` and
`router_logits` join what a step does one after the other.

Every launch says whether products and sums may be fused, because the default differs between versions of Triton, and
with it the last bits. Tested against `reference` in Triton's interpreter and compiled for sm_90. Never run on a GPU.
"""

from seamount.kernels.reference import causal_attention, dequantize_fp8_blocks

from .attention import latent_attention, paged_attention
from .experts import run_experts
from .flash import attend
from .routing import route_sigmoid, route_softmax, router_logits
from .rows import (
    add_rms_norm,
    apply_rotary,
    latent_rotate_and_cache,
    rms_norm,
    rotate_and_cache,
    swiglu,
    write_cache,
)

__all__ = [
    "add_rms_norm",
    "apply_rotary",
    "attend",
    "causal_attention",
    "dequantize_fp8_blocks",
    "latent_attention",
    "latent_rotate_and_cache",
    "paged_attention",
    "rms_norm",
    "rotate_and_cache",
    "route_sigmoid",
    "route_softmax",
    "router_logits",
    "run_experts",
    "swiglu",
    "write_cache",
]
