"""Trains the embedded model: `python -m seamount.training.pretraining.tiny RECIPE`, and again after a kill to go on.

`--export FOLDER` writes the run's last checkpoint as a Hugging Face folder instead of training; it may be used while
the run goes on. The place where recipe, corpus, loop and log meet.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer

from seamount.core.errors import CheckpointError, SeamountError
from seamount.models.network import CausalLM
from seamount.models.saving import save_folder
from seamount.training.pretraining import checkpoint
from seamount.training.pretraining.corpus import WEIGHTS, build_shard
from seamount.training.pretraining.data import Shard, TrainingData
from seamount.training.pretraining.loop import Progress, Trainer
from seamount.training.pretraining.probe import probe
from seamount.training.pretraining.progress import RunLog, loss_curve, read_records
from seamount.training.pretraining.recipe import Recipe


def train(recipe: Recipe) -> None:
    """Run a recipe to its end, or until SIGTERM or Ctrl-C, which end it after the step with a checkpoint."""
    log = RunLog(recipe.run_folder)
    tokenizer = _tokenizer(recipe)

    def shard_of(number: int) -> Shard:
        stage = recipe.data.stages[number]
        folder = recipe.run_folder / "shards" / f"stage-{number}"
        log.say(f"stage {number}: {stage.samples:,} samples in {folder}")
        build_shard(folder, tokenizer, stage.samples, recipe.seed + number, weights=stage.weights or WEIGHTS)
        shard = Shard(folder)
        longest = recipe.data.buckets[-1]
        if left_out := shard.num_longer_than(longest):
            log.say(f"{left_out:,} samples are longer than {longest} tokens and are left out")
        return shard

    def on_probe(model: CausalLM, progress: Progress) -> None:
        log.probe(probe(model, tokenizer, recipe.probe_items), progress)

    pad_id = recipe.model["pad_token_id"]
    data = TrainingData(recipe.data, recipe.seed, pad_id, shard_of)
    trainer = Trainer(recipe, data, on_step=log.step, on_probe=on_probe if recipe.probe_items else None)
    found = checkpoint.latest(recipe.run_folder / "checkpoints")
    if found is not None:
        log.rewind(int(found.name.removeprefix("step-")))
        log.say(f"going on from {found}")
    with _stopped_by_signals(trainer):
        trainer.run()


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask the trainer to stop; their handlers are put back after."""

    def stop(*_: object) -> None:
        trainer.stop_requested = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def export(recipe: Recipe, folder: Path) -> int:
    """Write the last checkpoint's weights in bf16 into `folder`; returns their bytes on disk."""
    found = checkpoint.latest(recipe.run_folder / "checkpoints")
    if found is None:
        raise CheckpointError(f"{recipe.run_folder} holds no checkpoint.", hint="Train first.")
    state, _ = checkpoint.load(found)
    tensors = {name.removeprefix("master."): t for name, t in state.items() if name.startswith("master.")}
    for name, tensor in state.items():
        if name.startswith("router."):
            tensors[f"{name.removeprefix('router.')}.e_score_correction_bias"] = tensor
    return save_folder(folder, recipe.model, tensors, torch.bfloat16)


def write_curve(recipe: Recipe, path: Path) -> None:
    """Write the run's loss curve to `path` as SVG."""
    records = read_records(recipe.run_folder / "metrics.jsonl")
    metrics = [record for record in records if record.get("phase") != "mtp"]
    probes = read_records(recipe.run_folder / "probes.jsonl")
    path.write_text(loss_curve(metrics, probes, f"Training of {recipe.name}"), encoding="utf-8")


def _tokenizer(recipe: Recipe) -> Tokenizer:
    path = recipe.data.tokenizer / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist.", hint="Make it with python -m seamount.training.pretraining.bpe."
        )
    return Tokenizer.from_file(str(path))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m seamount.training.pretraining.tiny", description=train.__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the last checkpoint there, and end")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="write the loss curve there as SVG, and end")
    given = parser.parse_args(arguments)
    try:
        recipe = Recipe.from_file(given.recipe)
        if given.export is not None:
            export(recipe, given.export)
        if given.curve is not None:
            write_curve(recipe, given.curve)
        if given.export is None and given.curve is None:
            train(recipe)
    except SeamountError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
