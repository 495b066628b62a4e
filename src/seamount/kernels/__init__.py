"""The numeric kernels, behind one API: callers never ask which chip they run on.

`reference` gives the semantics in plain torch: it is the oracle that every faster implementation is tested against.
`choice` picks the implementation at run time, under the same names; faster ones for a chip are added there.
"""

from .choice import causal_attention, run_experts
from .reference import (
    FP8_BLOCK,
    apply_rotary,
    dequantize_fp8_blocks,
    latent_attention,
    paged_attention,
    rms_norm,
    route_sigmoid,
    route_softmax,
    swiglu,
    write_cache,
)

__all__ = [
    "FP8_BLOCK",
    "apply_rotary",
    "causal_attention",
    "dequantize_fp8_blocks",
    "latent_attention",
    "paged_attention",
    "rms_norm",
    "route_sigmoid",
    "route_softmax",
    "run_experts",
    "swiglu",
    "write_cache",
]
