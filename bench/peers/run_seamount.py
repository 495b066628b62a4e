"""Runner for Seamount through its public Python interface; runs in the project's own environment, see protocol.py."""

from __future__ import annotations

from protocol import Generate, Options, Prompts, serve

from seamount.core.sampling import SamplingParams
from seamount.engine.llm import LLM


def load(options: Options) -> Generate:
    """Load the checkpoint in the precision that is asked for."""
    engine = LLM(
        options.model,
        dtype=options.extra["dtype"],
        device="cpu",
        max_model_len=options.max_tokens,
        max_num_seqs=options.max_concurrency,
        enable_prefix_cache=options.prefix_cache,
        num_threads=options.threads,
        cache_memory_bytes=int(options.extra["cache_bytes"]),
        quantization=options.extra["quantization"],
    )

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        return [len(completion.token_ids) for completion in engine.generate(prompts, sampling)]

    return generate


if __name__ == "__main__":
    serve(load)
