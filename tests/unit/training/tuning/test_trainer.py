"""The tuning loop: what a step computes does not depend on how it is cut, and a stopped run goes on to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tuning_site as site
from torch import Tensor

from seamount.core.errors import CheckpointError, ConfigError
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import ExampleList
from seamount.training.tuning.recipe import TuneRecipe
from seamount.training.tuning.state import CheckpointStore
from seamount.training.tuning.trainer import DivergedError, EvaluationRecord, StepRecord, Trainer


def train(
    dtype: torch.dtype = torch.float32, store: CheckpointStore | None = None, stop_after: int = 0, **sections: Any
) -> tuple[list[StepRecord], dict[str, Tensor]]:
    """Run the recipe; return its steps and the weights at its end, or where it was stopped."""
    records: list[StepRecord] = []

    def note(record: StepRecord) -> None:
        records.append(record)
        trainer.stop_requested = record.step == stop_after

    trainer = Trainer(
        site.recipe(**sections), site.network(dtype), site.examples(), world=site.ALONE, store=store, on_step=note
    )
    if store is not None and store.steps():
        trainer.restore()
    trainer.run()
    return records, trainer.final_weights()


def losses(records: list[StepRecord]) -> list[float]:
    return [record.loss for record in records]


@pytest.mark.parametrize("changes", [{"batch": {"micro_tokens": 64}}, {"activation_checkpointing": True}])
def test_how_a_step_is_cut_changes_nothing(changes: dict[str, Any]) -> None:
    whole, weights = train(batch={"micro_tokens": 4096})
    cut, cut_weights = train(**changes)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(cut_weights[name], weight, rtol=1e-3, atol=1e-4)


def test_the_loss_falls_and_the_rate_rises_then_falls() -> None:
    records, _ = train(schedule={"steps": 40})
    assert records[-1].loss < records[0].loss - 0.3
    rates = [record.learning_rate for record in records]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop_after", [1, 5])
def test_stopped_and_resumed_twice_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype, stop_after: int) -> None:
    sections: dict[str, Any] = {
        "optimizer": {"ema_decay": 0.9},
        "experts": {"bias_rate": 0.001, "balance_weight": 1e-3, "mtp_weight": 0.3},
        "activation_checkpointing": True,
    }
    _, wanted = train(dtype, **sections)
    store = CheckpointStore(tmp_path)
    train(dtype, store, stop_after, **sections)
    train(dtype, store, stop_after + 2, **sections)
    records, resumed = train(dtype, store, **sections)
    assert [record.step for record in records] == list(range(stop_after + 3, 9))
    assert resumed.keys() == wanted.keys()
    assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)


def test_a_checkpoint_of_other_data_recipe_or_network_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    train(store=store, stop_after=2)
    others = [
        Trainer(site.recipe(), site.network(), site.examples(seed=2), world=site.ALONE, store=store),
        Trainer(site.recipe(schedule={"steps": 9}), site.network(), site.examples(), world=site.ALONE, store=store),
        Trainer(site.recipe(), site.network(num_hidden_layers=3), site.examples(), world=site.ALONE, store=store),
    ]
    for other, words in zip(others, ["training data", "9", "another network"], strict=True):
        with pytest.raises(CheckpointError, match=words):
            other.restore()


def test_a_step_that_overflows_in_fp16_is_left_out_and_the_scale_halved() -> None:
    trainer = Trainer(site.recipe(precision="fp16"), site.network(torch.float16), site.examples(), world=site.ALONE)
    trainer.model.train()
    trainer.optimizer.loss_scale = 2.0**40
    before = {name: tensor.clone() for name, tensor in trainer.final_weights().items()}
    record = trainer.step()
    assert math.isnan(record.gradient_norm)
    assert trainer.optimizer.loss_scale == 2.0**39
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.final_weights().items())
    trainer.optimizer.loss_scale = 2.0**10
    record = trainer.step()
    assert math.isfinite(record.gradient_norm)


def test_what_is_evaluated_and_written_is_the_average_where_one_is_kept() -> None:
    sections: dict[str, Any] = {"optimizer": {"ema_decay": 0.5}, "saving": {"evaluate_every_steps": 100}}
    seen: list[EvaluationRecord] = []
    data = site.examples()
    trainer = Trainer(
        site.recipe(**sections),
        site.network(),
        data,
        world=site.ALONE,
        evaluation=data,
        on_evaluation=seen.append,
    )
    trainer.run()
    again = site.network()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(trainer.final_weights().get(name, parameter))
    other = Trainer(site.recipe(), again, data, world=site.ALONE, evaluation=data)
    assert other.evaluate() == pytest.approx(seen[-1].loss, rel=1e-5)
    masters = trainer.optimizer.masters
    assert any(not torch.equal(masters[name], tensor) for name, tensor in trainer.final_weights().items())


def test_on_a_plateau_the_rate_falls() -> None:
    sections: dict[str, Any] = {
        "schedule": {"kind": "plateau", "steps": 6, "plateau_patience": 1, "warmup_share": 0.0},
        "saving": {"evaluate_every_steps": 1},
        "data": {"evaluation_share": 0.1},
        "optimizer": {"learning_rate": 0.5},  # it only gets worse
    }
    records: list[StepRecord] = []
    trainer = Trainer(
        site.recipe(**sections),
        site.network(),
        site.examples(),
        world=site.ALONE,
        evaluation=site.examples(seed=9),
        on_step=records.append,
    )
    trainer.run()
    assert records[-1].learning_rate < records[0].learning_rate


def test_weights_that_nothing_trains_stay_as_they_are() -> None:
    model = site.network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(site.recipe(), model, site.examples(), world=site.ALONE).run()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert not any(name.startswith("mtp.") or "e_score_correction_bias" in name for name in changed)
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} <= changed


def test_busy_experts_are_biased_down_and_idle_ones_up() -> None:
    model = site.network()
    router = model.layers[1].mlp.gate
    with torch.no_grad():
        router.e_score_correction_bias[0] = 10.0  # always chosen
    trainer = Trainer(site.recipe(experts={"bias_rate": 0.01}), model, site.examples(), world=site.ALONE)
    record = trainer.step()
    assert record.imbalance == pytest.approx(2.0)  # 4 experts, 2 chosen, one of them always
    assert router.e_score_correction_bias[0] == pytest.approx(9.99)


def test_a_network_without_an_mtp_block_cannot_train_one() -> None:
    model = site.network(num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="MTP"):
        Trainer(site.recipe(experts={"mtp_weight": 0.3}), model, site.examples(), world=site.ALONE)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="No weight"):
        Trainer(site.recipe(), site.network().requires_grad_(False), site.examples(), world=site.ALONE)


def test_an_example_longer_than_the_models_context_is_refused() -> None:
    longer = Example(np.zeros(257, np.int32), np.ones(257, bool))
    with pytest.raises(ConfigError, match="257 tokens, and the model's context 256"):
        Trainer(site.recipe(), site.network(), ExampleList([longer]), world=site.ALONE)


def break_after(step: int, recipe: TuneRecipe, dtype: torch.dtype, store: CheckpointStore) -> Trainer:
    """A trainer whose weights are no numbers any more after a step."""

    def broken(record: StepRecord) -> None:
        if record.step == step:
            next(iter(trainer.optimizer.masters.values())).data.fill_(float("inf"))
            trainer.optimizer.publish()

    trainer = Trainer(recipe, site.network(dtype), site.examples(), world=site.ALONE, store=store, on_step=broken)
    return trainer


def test_a_run_that_diverged_stops_and_its_last_checkpoint_has_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    recipe = site.recipe(saving={"checkpoint_every_steps": 2})
    with pytest.raises(DivergedError, match="Step 4 .* diverged"):
        break_after(3, recipe, torch.float32, store).run()
    tensors, facts = store.load()
    assert facts["position"]["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_in_half_precision_it_stops_once_no_scale_of_the_loss_helps(tmp_path: Path) -> None:
    recipe = site.recipe(precision="fp16", schedule={"steps": 40})
    trainer = break_after(3, recipe, torch.float16, CheckpointStore(tmp_path))
    with pytest.raises(DivergedError, match="diverged"):
        trainer.run()
    assert trainer.optimizer.loss_scale == 1.0
