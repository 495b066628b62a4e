"""The tuning loop against a plain one over transformers' network: the same losses for the first fifty steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tuning_site as site
from transformers import PreTrainedModel

from seamount.models.network import CausalLM
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import ExampleList
from seamount.training.tuning.schedule import Schedule
from seamount.training.tuning.trainer import Trainer

NUM_STEPS, BATCH = 50, 4
_ASKED: dict[str, Any] = {
    "batch": {"examples": BATCH, "micro_tokens": 70},
    "schedule": {"steps": NUM_STEPS, "warmup_share": 0.1},
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
}

FAMILIES = ("v3", "v3-tied", "v2-lite", "qwen2", "qwen3", "llama")


def examples(vocab_size: int) -> ExampleList:
    chance = np.random.default_rng(5)
    made = []
    for length in chance.integers(5, 30, 40):
        trained = np.zeros(length, bool)
        trained[int(chance.integers(1, length - 1)) :] = True
        made.append(Example(chance.integers(3, vocab_size, length).astype(np.int32), trained))
    return ExampleList(made)


def plain_loop(model: PreTrainedModel, data: ExampleList, order: Callable[[int], Any]) -> list[float]:
    """Padded batches, one optimizer step each, the mean over the trained tokens."""
    recipe = site.recipe(**_ASKED)
    schedule = Schedule(recipe.schedule, recipe.learning_rate, NUM_STEPS)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(NUM_STEPS):
        rows = [data.example(int(index)) for index in order(step)]
        width = max(len(row.token_ids) for row in rows)
        token_ids, mask = torch.zeros(BATCH, width, dtype=torch.long), torch.zeros(BATCH, width, dtype=torch.long)
        labels = torch.full((BATCH, width), -100)
        for number, row in enumerate(rows):
            length, tokens = len(row.token_ids), torch.from_numpy(row.token_ids.astype(np.int64))
            token_ids[number, :length], mask[number, :length] = tokens, 1
            labels[number, :length] = torch.where(torch.from_numpy(row.trained), tokens, -100)
        logits = model(token_ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = schedule.rate(step)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("family_case", FAMILIES, indirect=True)
def test_fifty_steps_lose_as_a_plain_loop_over_transformers_does(
    family_case: tuple[type, dict[str, Any]], write_checkpoint: Callable[..., Any], load: Callable[..., CausalLM]
) -> None:
    config_type, fields = family_case
    folder: Path
    folder, reference = write_checkpoint(config_type(**fields))
    model = load(folder, packed=False).requires_grad_(True)
    data = examples(fields["vocab_size"])
    losses: list[float] = []
    trainer = Trainer(
        site.recipe(**_ASKED), model, data, world=site.ALONE, on_step=lambda record: losses.append(record.loss)
    )
    order = trainer._order
    trainer.run()
    wanted = plain_loop(reference.train(), data, order)
    assert losses[0] - losses[-1] > 0.01
    assert losses == pytest.approx(wanted, abs=1e-4)
