"""Greedy continuations through the whole engine equal those of transformers, token for token.

Prompts run side by side, cut into chunks by a small step, over a cache of small blocks.
"""

from __future__ import annotations

from typing import Any

import pytest

from seamount import LLM, SamplingParams

NUM_TOKENS = 64


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers, without shared experts
def test_greedy_continuation_equals_transformers(
    family_case: tuple[Any, dict[str, Any]], write_checkpoint: Any, prompts: Any, reference_greedy: Any
) -> None:
    kind, arguments = family_case
    folder, reference = write_checkpoint(kind(**arguments), seed=11)
    llm = LLM(
        str(folder),
        device="cpu",
        num_threads=1,
        cache_memory_bytes=2**21,
        block_size=4,
        max_num_seqs=8,
        max_step_tokens=16,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    ours = [list(c.token_ids) for c in llm.generate(prompts, greedy)]
    assert ours == reference_greedy(reference, prompts, NUM_TOKENS)
