"""Each family and variation gives the logits of transformers, through the paged, batched path.

Checkpoints are written by transformers with random weights and read by the project's own loader.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("packed", [True, False], ids=["compiled kernels", "plain torch"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers, without shared experts
def test_logits_equal_those_of_transformers(
    family_case: Any,
    packed: bool,
    write_checkpoint: Any,
    load: Any,
    paged_driver: Any,
    prompts: Any,
    reference_logits: Any,
) -> None:
    kind, arguments = family_case
    folder, reference = write_checkpoint(kind(**arguments), seed=7)
    ours = paged_driver(load(folder, packed=packed)).all_logits(prompts)
    for mine, theirs in zip(ours, reference_logits(reference, prompts), strict=True):
        assert theirs.std() > 0.3
        assert (mine - theirs).abs().max() < 1e-4
        assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
