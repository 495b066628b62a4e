"""Who is measured: one table. Called by the driver and the report; starts nothing.

`environment` names a row of `environments.PINS`, or is None for the project's own. `artifact` says what the peer reads
(see artifacts.py). `extra` are settings that only its runner knows: what its maintainers document as best for a CPU, or
what was tried here and found faster.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Peer:
    """One way to run a model, with its precision class: 32, 16, 8 or 4 bits per weight."""

    name: str
    bits: int
    environment: str | None
    runner: str
    artifact: str
    extra: dict[str, str] = field(default_factory=dict)
    shapes: tuple[str, ...] = ()
    default: bool = True

    @property
    def ours(self) -> bool:
        """Whether this is Seamount itself."""
        return self.environment is None


def _seamount(name: str, bits: int, quantization: str, dtype: str, shapes: tuple[str, ...] = ()) -> Peer:
    extra = {"quantization": quantization, "dtype": dtype}
    return Peer(f"seamount-{name}", bits, None, "run_seamount.py", "checkpoint", extra, shapes)


def _openvino(bits: int) -> Peer:
    # The scheduler's own default is 256 tokens a step; prefill is faster with more.
    extra = {"batched_tokens": "2048", "hint": "LATENCY"}
    return Peer(f"openvino-int{bits}", bits, "openvino", "run_openvino.py", f"openvino-int{bits}", extra)


def _llamacpp(name: str, bits: int, kind: str, build: str) -> Peer:
    native = build == "native"
    return Peer(name, bits, "llamacpp", "run_llamacpp.py", f"gguf-{kind}", {"build": build}, default=native)


def _vllm(name: str, bits: int, artifact: str) -> Peer:
    return Peer(name, bits, "vllm", "run_vllm.py", artifact, {"batched_tokens": "2048"})


def _transformers(name: str, bits: int, mode: str, dtype: str, shapes: tuple[str, ...] = ()) -> Peer:
    extra = {"mode": mode, "dtype": dtype, "batched_tokens": "2048"}
    return Peer(name, bits, "transformers", "run_transformers.py", "checkpoint", extra, shapes)


PEERS = (
    _seamount("bf16", 16, "none", "bfloat16"),
    _seamount("int8", 8, "int8", "bfloat16"),
    _seamount("int4", 4, "int4", "bfloat16"),
    _seamount("fp32", 32, "none", "float32", shapes=("seamount-tiny",)),
    _openvino(8),
    _openvino(4),
    _llamacpp("llamacpp-q8_0", 8, "Q8_0", "native"),
    _llamacpp("llamacpp-q4_0", 4, "Q4_0", "native"),
    _llamacpp("xllamacpp-q8_0", 8, "Q8_0", "package"),
    _llamacpp("xllamacpp-q4_0", 4, "Q4_0", "package"),
    _vllm("vllm-bf16", 16, "checkpoint"),
    _vllm("vllm-int8", 8, "w8a8"),
    _transformers("transformers-bf16", 16, "generate", "bfloat16"),
    _transformers("transformers-cb-bf16", 16, "continuous", "bfloat16"),
    _transformers("transformers-fp32", 32, "generate", "float32", shapes=("seamount-tiny",)),
)
