"""The loop: it learns, goes on after a kill to the same bits, balances experts, and can be ended early."""

import pytest
import torch

from seamount.training.pretraining import checkpoint
from seamount.training.pretraining.data import TrainingData
from seamount.training.pretraining.loop import Trainer


class Killed(BaseException):
    """Stands for a kill: nothing below may catch it."""


def trainer_of(recipe, shard, on_step=lambda record, progress: None, on_probe=None):
    data = TrainingData(recipe.data, recipe.seed, 2, lambda number: shard)
    return Trainer(recipe, data, on_step=on_step, on_probe=on_probe)


def weights_of(trainer):
    biases = {name: b for name, b in trainer.model.named_buffers() if name.endswith("correction_bias")}
    return {**{name: p.detach() for name, p in trainer.model.named_parameters()}, **biases}


def test_the_loss_falls_on_something_learnable(make_recipe, tmp_path, shard):
    losses = []
    schedule = {"warmup_steps": 5, "total_steps": 60, "decay_steps": 30}
    recipe = make_recipe(tmp_path, schedule=schedule, mtp=None)
    trainer_of(recipe, shard, lambda record, progress: losses.append(record.loss)).run()
    assert losses[0] > 3.5
    assert sum(losses[-5:]) / 5 < 0.4


def test_killed_at_a_step_and_run_again_gives_the_same_bits(make_recipe, tmp_path, shard):
    whole = trainer_of(make_recipe(tmp_path / "whole"), shard)
    whole.run()

    def kill_at_7(record, progress):
        if record.step == 7:
            raise Killed

    recipe = make_recipe(tmp_path / "killed")
    with pytest.raises(Killed):
        trainer_of(recipe, shard, kill_at_7).run()
    assert checkpoint.latest(tmp_path / "killed" / "checkpoints").name == "step-4"
    steps = []
    again = trainer_of(recipe, shard, lambda record, progress: steps.append(record.step))
    again.run()
    assert steps == list(range(5, 16))
    wanted, found = weights_of(whole), weights_of(again)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert again.progress == whole.progress


def test_learning_rate_rises_stays_and_falls_to_almost_nothing(make_recipe, tmp_path, shard):
    rates = []
    trainer_of(make_recipe(tmp_path), shard, lambda record, progress: rates.append(record.learning_rate)).run()
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert rates[7:12] == pytest.approx([0.01, 0.01, 0.0075, 0.005, 0.0025])
    assert rates[12:] == pytest.approx([0.01, 0.02 / 3, 0.01 / 3])


def test_an_anneal_file_ends_the_run_early(make_recipe, tmp_path, shard):
    rates = []

    def ask_at_3(record, progress):
        rates.append(record.learning_rate)
        if record.step == 3:
            (tmp_path / "ANNEAL").write_text("2", encoding="utf-8")

    trainer = trainer_of(make_recipe(tmp_path, mtp=None), shard, ask_at_3)
    trainer.run()
    assert rates[2:] == pytest.approx([0.01, 0.01, 0.005])
    assert not (tmp_path / "ANNEAL").exists()
    assert trainer.progress.end_step == 5


def test_a_requested_stop_leaves_a_checkpoint(make_recipe, tmp_path, shard):
    def stop_at_2(record, progress):
        trainer.stop_requested = record.step == 2

    trainer = trainer_of(make_recipe(tmp_path), shard, stop_at_2)
    trainer.run()
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-2"


def test_router_bias_moves_against_the_load(make_recipe, tmp_path, shard):
    seen = []

    def record_bias(record, progress):
        seen.append(trainer.model.layers[1].mlp.gate.e_score_correction_bias.clone())

    trainer = trainer_of(make_recipe(tmp_path, router_bias_rate=0.01), shard, record_bias)
    trainer.run()
    assert seen[0].abs().max() == pytest.approx(0.01)
    assert seen[0].min() < 0 < seen[0].max()
    assert seen[0].dtype == torch.float32


def test_the_mtp_block_learns_alone_when_the_rest_is_done(make_recipe, tmp_path, shard):
    phases, weights = [], []

    def keep(record, progress):
        phases.append(record.phase)
        weights.append({name: tensor.clone() for name, tensor in weights_of(trainer).items()})

    trainer = trainer_of(make_recipe(tmp_path), shard, keep)
    trainer.run()
    assert phases == ["main"] * 12 + ["mtp"] * 3
    changed_by_main = {name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[11][name])}
    changed_by_mtp = {name for name, tensor in weights[11].items() if not torch.equal(tensor, weights[14][name])}
    assert changed_by_main
    assert not any(name.startswith("mtp.") for name in changed_by_main)
    assert changed_by_mtp
    assert all(name.startswith("mtp.") for name in changed_by_mtp)


def test_probes_come_at_their_steps_and_at_the_end(make_recipe, tmp_path, shard):
    probed = []

    def on_probe(model, progress):
        probed.append((progress.step, model.training))

    trainer = trainer_of(make_recipe(tmp_path, probe_every_steps=5), shard, on_probe=on_probe)
    trainer.run()
    assert probed == [(5, False), (10, False), (12, False)]
    assert trainer.model.training
