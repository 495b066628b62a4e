"""Runner for OpenVINO GenAI's continuous batching; runs inside its environment, see protocol.py."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai
from protocol import Generate, Options, Prompts, serve


def load(options: Options) -> Generate:
    """Load the converted folder; the cache's precision and the kernels are OpenVINO's own choice."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = options.prefix_cache
    scheduler.max_num_seqs = max(options.max_concurrency, 1)
    scheduler.max_num_batched_tokens = int(options.extra["batched_tokens"])
    properties = {
        "INFERENCE_NUM_THREADS": options.threads,
        "PERFORMANCE_HINT": options.extra["hint"],
        "NUM_STREAMS": 1,
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(tensors))
        return [len(result.m_generation_ids[0]) for result in results]

    return generate


if __name__ == "__main__":
    serve(load)
