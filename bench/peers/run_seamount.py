"""Runner for Seamount through its public Python interface; runs in the project's own environment, see protocol.py."""

from __future__ import annotations

from protocol import Generate, Options, Prompts, serve

from seamount.core.sampling import SamplingParams
from seamount.core.settings import EngineConfig
from seamount.engine.llm import LLM


def load(options: Options) -> Generate:
    """Load the checkpoint; a precision that this version does not know is an error that says so."""
    precision: dict[str, str] = {}
    if "quantization" in EngineConfig.model_fields:
        precision["quantization"] = options.extra["quantization"]
    elif options.extra["quantization"] != "none":
        raise NotImplementedError("this version of Seamount has no option `quantization`")
    engine = LLM(
        options.model,
        dtype=options.extra["dtype"],
        device="cpu",
        max_model_len=options.max_tokens,
        max_num_seqs=options.max_concurrency,
        enable_prefix_cache=options.prefix_cache,
        num_threads=options.threads,
        cache_memory_bytes=int(options.extra["cache_bytes"]),
        **precision,
    )

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        return [len(completion.token_ids) for completion in engine.generate(prompts, sampling)]

    return generate


if __name__ == "__main__":
    serve(load)
