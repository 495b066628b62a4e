"""An 8-bit folder of `seamount quantize` means the same to transformers, which reads it with compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from seamount import LLM, SamplingParams
from seamount.training.compression.compress import Job, quantize

from .conftest import DENSE


@pytest.mark.filterwarnings("ignore")  # what transformers and compressed-tensors deprecate of each other
def test_log_probabilities_are_the_same_but_for_rounded_activations(
    write_checkpoint: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    source, _ = write_checkpoint(Qwen2Config(**DENSE, tie_word_embeddings=False))
    folder = tmp_path.with_name(f"{tmp_path.name}-int8")
    quantize(Job(folder=source, output=folder, method="rtn", bits=8))
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    llm = LLM(str(folder), dtype="float32", device="cpu", num_threads=1, max_model_len=64)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    prompt = list(range(3, 23))
    (found,) = llm.generate([prompt], sampling)
    with torch.inference_mode():
        logprobs = other(torch.tensor([[*prompt, *found.token_ids]])).logits[0].log_softmax(dim=-1)
    rows = logprobs[len(prompt) - 1 : -1]
    theirs = rows.gather(1, torch.tensor(found.token_ids).unsqueeze(1)).squeeze(1)
    ours = torch.tensor([position.chosen.logprob for position in found.logprobs])
    # Both round activations while they run, to steps that differ a little; a scale amiss would shift whole units.
    assert (ours - theirs).abs().max() < 0.15
    assert (ours - theirs).abs().mean() < 0.05
