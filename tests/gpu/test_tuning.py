"""Tuning on a GPU: the losses of a CPU, a run that goes on, bounded activations, two GPUs that train as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tuning_site as site

from seamount.training.adapters.lora import add_adapters
from seamount.training.adapters.qlora import quantize_base
from seamount.training.tuning.distributed import World
from seamount.training.tuning.recipe import AdapterSection
from seamount.training.tuning.state import CheckpointStore
from seamount.training.tuning.trainer import StepRecord, Trainer

DEVICE = torch.device("cuda", 0)
PROGRAM = Path(__file__).parents[1] / "support" / "tuning_ranks.py"
METHODS = ("full", "lora", "qlora")


def trainer(device: torch.device, dtype: torch.dtype, method: str = "full", **given: Any) -> Trainer:
    sections, adapter = given.pop("sections", {}), AdapterSection(rank=4, targets=("linear", "experts"))
    model = site.network(dtype)
    model.to(device)
    if method != "full":
        add_adapters(model, adapter, seed=0)
    if method == "qlora":
        quantize_base(model)
    return Trainer(site.recipe(**sections), model, site.examples(), world=World(0, 1, device), **given)


def losses(device: torch.device, dtype: torch.dtype, method: str, **sections: Any) -> list[float]:
    seen: list[StepRecord] = []
    trainer(device, dtype, method, on_step=seen.append, sections=sections).run()
    return [record.loss for record in seen]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_losses_are_those_of_a_cpu(method: str, dtype: torch.dtype, within: float) -> None:
    assert losses(DEVICE, dtype, method) == pytest.approx(losses(torch.device("cpu"), dtype, method), rel=within)


def test_half_precision_scales_its_loss_and_learns() -> None:
    found = losses(DEVICE, torch.float16, "full", precision="fp16")
    assert found[-1] < found[0]


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """Within rounding: sums over a GPU's threads have no fixed order, so equal bits are not promised here."""
    whole = trainer(DEVICE, torch.float32)
    whole.run()
    first = trainer(DEVICE, torch.float32, store=CheckpointStore(tmp_path))
    for _ in range(3):
        first.step()
    first.save()
    resumed = trainer(DEVICE, torch.float32, store=CheckpointStore(tmp_path))
    resumed.restore()
    resumed.run()
    for name, weight in whole.final_weights().items():
        torch.testing.assert_close(resumed.final_weights()[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_checkpointing_bounds_activations() -> None:
    taken = []
    for checkpointed in (False, True):
        run = trainer(DEVICE, torch.float32, "lora", sections={"activation_checkpointing": checkpointed})
        run.model.train()
        run.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.step()
        taken.append(torch.cuda.max_memory_allocated() - before)
    assert taken[1] < taken[0]


def test_two_gpus_lose_as_one_does(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here, and two are needed")
    told = []
    for count, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        folder = tmp_path / f"{strategy}-{count}"
        folder.mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent)}
        subprocess.run(
            [*launcher, str(PROGRAM), strategy, str(folder), "-1", "cuda"], env=environment, check=True, timeout=300
        )
        told.append(json.loads((folder / "seen.json").read_text(encoding="utf-8"))["losses"])
    assert told[1] == pytest.approx(told[0], rel=1e-3)
    assert told[2] == pytest.approx(told[0], rel=1e-3)
