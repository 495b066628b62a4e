"""Runner for transformers, `generate` or its continuous batching; runs inside its environment, see protocol.py."""

from __future__ import annotations

import torch
import transformers
from protocol import Generate, Options, Prompts, serve


def load(options: Options) -> Generate:
    """Load the checkpoint with PyTorch's fused attention; `extra["mode"]` chooses how it generates."""
    torch.set_num_threads(options.threads)
    paged = options.extra["mode"] == "continuous"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=getattr(torch, options.extra["dtype"]),
        attn_implementation="sdpa",
    )
    model.eval()
    # An end token would end sequences early; without one every sequence gets exactly its new tokens.
    model.generation_config.eos_token_id = None
    return _continuous(model, options) if paged else _batched(model)


def _batched(model: transformers.PreTrainedModel) -> Generate:
    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [out.shape[1] - ids.shape[1]] * len(prompts)

    return generate


def _continuous(model: transformers.PreTrainedModel, options: Options) -> Generate:
    page = 256
    # One page more per sequence than it needs: the last one is seldom full.
    pages = options.max_concurrency * (-(-options.max_tokens // page) + 1)
    batching = transformers.ContinuousBatchingConfig(
        page_size=page,
        num_blocks=pages,
        max_batch_tokens=int(options.extra["batched_tokens"]),
        allow_block_sharing=options.prefix_cache,
    )
    fixed = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        results = model.generate_batch(
            prompts,
            generation_config=fixed,
            continuous_batching_config=batching,
            max_new_tokens=new_tokens,
            persistent_manager=True,
            progress_bar=False,
        )
        for result in results.values():
            if result.error:
                raise RuntimeError(result.error)
        return [len(result.generated_tokens) for result in results.values()]

    return generate


if __name__ == "__main__":
    serve(load)
