"""What each rank of a distributed test runs: every method of tuning in small, one after the other.

tuning_ways.py FOLDER STRATEGY [STRATEGY]: writes FOLDER/STRATEGY-METHOD.json, and adapters to FOLDER/STRATEGY-METHOD.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import tuning_site as site

from seamount.training.adapters.lora import add_adapters
from seamount.training.adapters.qlora import quantize_base
from seamount.training.distillation.objective import DistillationObjective
from seamount.training.distillation.teacher import Teacher
from seamount.training.tuning.distributed import World, make_whole
from seamount.training.tuning.network import DTYPES, Tuned, write_result
from seamount.training.tuning.routing import routers_of
from seamount.training.tuning.state import CheckpointStore
from seamount.training.tuning.trainer import EvaluationRecord, Objective, StepRecord, Trainer

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 4}, "optimizer": {"ema_decay": 0.9}},
    "experts": {"adapter": {"rank": 4, "targets": ["linear", "experts"]}},
    "qlora": {"adapter": {"rank": 4, "method": "qlora", "targets": ["linear", "experts"]}},
    "half": {"precision": "fp16", "activation_checkpointing": True},
    "routers": {"precision": "bf16", "experts": {"balance_weight": 0.01}},
    "distill": {},
}


def main() -> None:
    """Run one rank."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = World.join("cpu")
    for strategy in sys.argv[2:]:
        for way in WAYS:
            train(way, strategy, folder / f"{strategy}-{way}", world)
    world.leave()


def train(way: str, strategy: str, folder: Path, world: World) -> None:
    """Tune the small network in one way."""
    recipe = site.recipe(folder, strategy=strategy, **WAYS[way])
    dtype = torch.float32 if recipe.precision == "auto" else DTYPES[recipe.precision]
    model = site.network(dtype)
    if way == "routers":  # as in checkpoints that keep them in fp32
        for router in routers_of(model):
            router.weight.data = router.weight.data.float()
    if recipe.adapter is not None:
        if recipe.adapter.method == "qlora":
            quantize_base(model)
        add_adapters(model, recipe.adapter, seed=recipe.seed)
    objective: Objective | None = None
    if way == "distill":
        objective = DistillationObjective(Teacher(site.network(seed=9), 1.0).guide, 0.5, 1.0)
    losses: list[float] = []

    def heard(record: StepRecord | EvaluationRecord) -> None:
        losses.append(record.loss)

    trainer = Trainer(
        recipe,
        model,
        site.examples(),
        world=world,
        evaluation=site.examples(seed=8),
        objective=objective,
        store=CheckpointStore(folder / "checkpoints"),
        on_step=heard,
        on_evaluation=heard,
    )
    trainer.run()
    weights = trainer.final_weights()
    make_whole(model, world)
    if world.is_main:
        if recipe.adapter is not None:
            write_result(recipe, Tuned(model, folder, {}, {}, dtype), weights, folder)
        folder.with_suffix(".json").write_text(json.dumps({"losses": losses, "size": world.size}), encoding="utf-8")


if __name__ == "__main__":
    main()
