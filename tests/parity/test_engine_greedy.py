"""Greedy continuations through the whole engine equal those of transformers, token for token.

Prompts run side by side, cut into chunks by a small step, over a cache of small blocks.
"""

from __future__ import annotations

from typing import Any

import pytest

NUM_TOKENS = 64


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers, without shared experts
def test_greedy_continuation_equals_transformers(
    family_case: Any, write_checkpoint: Any, prompts: Any, reference_greedy: Any, engine_greedy: Any
) -> None:
    kind, arguments = family_case
    folder, reference = write_checkpoint(kind(**arguments), seed=11)
    assert engine_greedy(folder, prompts, NUM_TOKENS) == reference_greedy(reference, prompts, NUM_TOKENS)
