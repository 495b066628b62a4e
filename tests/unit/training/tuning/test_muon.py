"""Muon inside the tuning loop: the updates that the embedded model was made with, and a resume to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tuning_site as site

from seamount.core.errors import CheckpointError, ConfigError
from seamount.training.pretraining.optimizer import Optimizer as Pretraining
from seamount.training.pretraining.recipe import OptimizerSection as PretrainingSection
from seamount.training.tuning.optimizer import Optimizer
from seamount.training.tuning.recipe import AdapterSection, OptimizerSection
from seamount.training.tuning.state import CheckpointStore
from seamount.training.tuning.trainer import Trainer

MUON = {"method": "muon", "learning_rate": 4e-3, "weight_decay": 0.01}


def test_updates_are_those_of_pretraining() -> None:
    networks = [site.network(), site.network()]
    mine = Optimizer(dict(networks[0].named_parameters()), OptimizerSection(method="muon", clip_norm=0.5))
    theirs = Pretraining(
        networks[1].named_parameters(), PretrainingSection(learning_rate=1.0, weight_decay=0.0, clip_norm=0.5)
    )
    generator = torch.Generator().manual_seed(0)
    for rate in (1e-2, 5e-3, 2e-3):
        for first, second in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            first.grad = torch.empty(first.shape).normal_(generator=generator)
            second.grad = first.grad.clone()
        assert mine.step(rate) == pytest.approx(theirs.step(rate), rel=1e-4)
    for (name, first), second in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4, msg=name)


def run(store: CheckpointStore | None, stop_after: int = 0) -> dict[str, torch.Tensor]:
    recipe = site.recipe(optimizer=MUON)

    def note(record: object) -> None:
        trainer.stop_requested = trainer.position.step == stop_after

    trainer = Trainer(
        recipe, site.network(torch.bfloat16), site.examples(), world=site.ALONE, store=store, on_step=note
    )
    if store is not None and store.steps():
        trainer.restore()
    trainer.run()
    return trainer.final_weights()


def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = run(None)
    run(CheckpointStore(tmp_path), stop_after=3)
    resumed = run(CheckpointStore(tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("methods", [("adamw", "muon"), ("muon", "adamw")])
def test_a_checkpoint_of_the_other_method_is_refused(tmp_path: Path, methods: tuple[str, str]) -> None:
    before, after = (
        Trainer(
            site.recipe(optimizer=MUON | {"method": method}),
            site.network(),
            site.examples(),
            world=site.ALONE,
            store=CheckpointStore(tmp_path),
        )
        for method in methods
    )
    before.step()
    before.save()
    with pytest.raises(CheckpointError, match=r"optimizer\.method"):
        after.restore()


def test_muon_is_for_whole_networks() -> None:
    with pytest.raises(ConfigError, match="muon"):
        site.recipe(optimizer=MUON, adapter=AdapterSection())
    with pytest.raises(ConfigError, match="muon"):
        site.recipe(optimizer=MUON, strategy="fsdp")
