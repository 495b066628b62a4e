"""Runner for vLLM on CPU; runs inside its environment, see protocol.py."""

from __future__ import annotations

import os

from protocol import Generate, Options, Prompts, serve


def load(options: Options) -> Generate:
    """Load the checkpoint as it is, in bfloat16, in this process, one thread bound to each core."""
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in cores)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = options.extra["cache_gib"]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Only now: vLLM reads these settings while it is imported.
    from vllm import LLM, SamplingParams

    engine = LLM(
        options.model,
        dtype="bfloat16",
        max_model_len=options.max_tokens,
        max_num_seqs=options.max_concurrency,
        max_num_batched_tokens=int(options.extra["batched_tokens"]),
        enable_prefix_caching=options.prefix_cache,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        generation_config="vllm",
    )

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        results = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [len(result.outputs[0].token_ids) for result in results]

    return generate


if __name__ == "__main__":
    serve(load)
