"""The numeric kernels, behind one API: callers never ask which chip they run on.

`reference` gives the semantics in plain torch: it is the oracle that every faster implementation is tested against.
`native/` holds the compiled CPU kernels, `library` builds and loads them, `packed` multiplies with them, `recording`
makes all calls of a step at once. `choice` picks the implementation at run time, under the same names.
"""

from .choice import (
    apply_rotary,
    argmax,
    cache_latent,
    can_capture,
    candidates,
    causal_attention,
    join_norms,
    latent_attention,
    latent_rotate_and_cache,
    packed_latent_attention,
    paged_attention,
    rms_norm,
    rotate_and_cache,
    route_sigmoid,
    route_softmax,
    router_logits,
    run_experts,
    run_packed_experts,
    swiglu,
    write_cache,
)
from .differentiable import run_grouped_experts
from .library import describe, isa_name, library, why_missing
from .packed import (
    DEFAULT_GROUP,
    Kind,
    PackedMatrix,
    PackedStack,
    packed_feed_forward,
    packed_num_bytes,
    set_threads,
    want_large_pages,
)
from .pages import Pages
from .recording import Arena, Recording, record
from .reference import FP8_BLOCK, dequantize_fp8_blocks, run_each_expert, weigh_experts

__all__ = [
    "DEFAULT_GROUP",
    "FP8_BLOCK",
    "Arena",
    "Kind",
    "PackedMatrix",
    "PackedStack",
    "Pages",
    "Recording",
    "apply_rotary",
    "argmax",
    "cache_latent",
    "can_capture",
    "candidates",
    "causal_attention",
    "dequantize_fp8_blocks",
    "describe",
    "isa_name",
    "join_norms",
    "latent_attention",
    "latent_rotate_and_cache",
    "library",
    "packed_feed_forward",
    "packed_latent_attention",
    "packed_num_bytes",
    "paged_attention",
    "record",
    "rms_norm",
    "rotate_and_cache",
    "route_sigmoid",
    "route_softmax",
    "router_logits",
    "run_each_expert",
    "run_experts",
    "run_grouped_experts",
    "run_packed_experts",
    "set_threads",
    "swiglu",
    "want_large_pages",
    "weigh_experts",
    "why_missing",
    "write_cache",
]
