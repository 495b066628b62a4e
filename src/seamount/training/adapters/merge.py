"""Adds an adapter to its model for good: `merge` writes a whole new checkpoint, tensor by tensor.

Called by the command `seamount merge`. Tensors that the adapter leaves alone are copied as they are; a sum is formed in
fp32 and rounded once, to the type that the tensor has. What is stored in few bits is written as numbers of the config's
type. OUTPUT.partial takes the output's name when all of it is on the disk; what a stopped merge left there is
removed by the next one. Neither source is changed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from seamount.core.errors import CapacityError, ConfigError, UnsupportedModelError
from seamount.core.sizes import size_text
from seamount.models.adapter import Adapter
from seamount.models.checkpoint import INDEX_NAME, Checkpoint, StoredTensor
from seamount.models.config import ModelConfig
from seamount.models.keymap import Placement, is_ignored
from seamount.models.load_plan import LoadPlan, plan_load
from seamount.models.locate import is_gguf
from seamount.models.reading import Reader
from seamount.models.saving import companions
from seamount.models.tokenizer import read_json_object
from seamount.training.compression.files import TORCH_DTYPES, Entry, ShardWriter, write_whole
from seamount.training.compression.work import check_output, partial_of

_MARK = "merge-under-way"
_OF_CODES = ("quantization_config", "compression_config")
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# Told the bytes written so far and the bytes in all.
Progress = Callable[[int, int], None]


def merge(model: Path, adapter: Path, output: Path, *, progress: Progress | None = None) -> None:
    """Write the sum of a checkpoint folder and an adapter folder to `output`, which must not exist.

    Raises:
        CheckpointError: one of the two is broken, or they do not belong together; names file and tensor.
        ConfigError: something stands at the output, or another process is writing it.
        CapacityError: the disk does not suffice; nothing is left of what was begun.
    """
    output = output.expanduser().resolve()
    if is_gguf(model):
        raise UnsupportedModelError(
            f"{model} is a GGUF file, and adapters are merged into folders of safetensors.",
            hint="Merge into the checkpoint that the file was made from.",
        )
    if any(output.is_relative_to(source.resolve()) for source in (model, adapter)):
        raise ConfigError(f"{output} is inside what is read.", hint="Choose an output beside it, or elsewhere.")
    check_output(output)
    plan = plan_load(model, ModelConfig.from_folder(model)).with_adapter(Adapter.from_folder(adapter), dequantize=True)
    shards = _shards(plan)
    total = sum(entry.num_bytes for shard in shards.values() for entry, _ in shard.values())
    _check_disk(output, total)
    try:
        with _partial_folder(output) as partial:
            _write_weights(plan, shards, partial, total, progress)
            _write_companions(plan, partial)
    except OSError as cause:
        raise CapacityError(f"{partial_of(output)} cannot be written: {cause.strerror}.") from cause


# By name in the output: what is written; and the placement it is read along, or the stored tensor that is copied.
_Shard = dict[str, tuple[Entry, Placement | StoredTensor]]


def _shards(plan: LoadPlan) -> dict[Path, _Shard]:
    """What each file of the output holds: what the source's file of the same name does."""
    # A base model's tensors are stored without the beginning that the plan gives them.
    stored_names = Checkpoint.from_folder(plan.checkpoint.folder).tensors.keys()
    shards: dict[Path, _Shard] = {path: {} for path in plan.checkpoint.files}
    for key, place in plan.places.items():
        source: Placement | StoredTensor
        if _is_coded(plan, key):
            dtype, source = _NAMES[getattr(torch, plan.config.dtype)], place
        else:
            stored = plan.checkpoint.tensors[key]
            dtype, source = stored.dtype, place if plan.is_adapted(place) else stored
            dtype = "F32" if dtype == "F64" and source is place else dtype
        name = key if key in stored_names or _is_coded(plan, key) else key.removeprefix("model.")
        shards[plan.file_of(key)][name] = (Entry(name, dtype, place.shape), source)
    for key, stored in plan.checkpoint.tensors.items():
        if key not in plan.places and is_ignored(plan.config, key) and stored.num_bytes:
            shards[stored.path][key] = (Entry(key, stored.dtype, stored.shape), stored)
    return {path: shard for path, shard in shards.items() if shard}


def _is_coded(plan: LoadPlan, key: str) -> bool:
    return key in plan.encoded or key in plan.scales


def _write_weights(
    plan: LoadPlan, shards: dict[Path, _Shard], folder: Path, total: int, progress: Progress | None
) -> None:
    done, placed = 0, {}
    with Reader(plan, total, None) as reader:
        for path, shard in shards.items():
            with ShardWriter(folder / path.name, [entry for entry, _ in shard.values()]) as writer:
                for name, (entry, source) in shard.items():
                    if isinstance(source, StoredTensor):
                        writer.copy(dataclasses.replace(source, name=name))
                    else:
                        values = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
                        reader.read(source, values)
                        writer.write(name, values)
                    placed[name] = path.name
                    done += entry.num_bytes
                    if progress is not None:
                        progress(done, total)
    if (plan.checkpoint.folder / INDEX_NAME).exists():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        write_whole(folder / INDEX_NAME, _json(index))


def _write_companions(plan: LoadPlan, folder: Path) -> None:
    """Everything beside the weights: config, tokenizer, templates, sampling defaults, licence."""
    source = plan.checkpoint.folder
    for path in companions(source, without=("quantization_report.json",)):
        write_whole(folder / path.name, path.read_bytes())
    templates = source / "chat_templates"
    if templates.is_dir():
        (folder / templates.name).mkdir()
        for path in sorted(templates.glob("*.jinja")):
            write_whole(folder / templates.name / path.name, path.read_bytes())
    config = (source / "config.json").read_bytes()
    if any(_is_coded(plan, key) for key in plan.places):
        described = read_json_object(source / "config.json") or {}
        config = _json({name: value for name, value in described.items() if name not in _OF_CODES})
    write_whole(folder / "config.json", config)


@contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """The folder that becomes the output when the block ends well, and goes when it does not; for one process alone."""
    partial = partial_of(output)
    partial.mkdir(parents=True, exist_ok=True)
    if any(partial.iterdir()) and not (partial / _MARK).exists():
        raise ConfigError(f"{partial} exists and is no unfinished merge.", hint="Remove it, or choose another output.")
    with open(partial / _MARK, "w", encoding="utf-8") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise ConfigError(f"Another process is writing {partial}.") from cause
        try:
            for left in partial.iterdir():  # by a merge that was killed
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != _MARK:
                    left.unlink()
            yield partial
            os.replace(partial, output)
            (output / _MARK).unlink()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _check_disk(output: Path, needed: int) -> None:
    parent = next(folder for folder in output.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CapacityError(
            f"{size_text(needed)} of disk is needed at {parent}; {size_text(free)} is free.",
            hint="Free space, or choose an output on another disk.",
        )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
