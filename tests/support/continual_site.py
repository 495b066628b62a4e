"""A small model with a real tokenizer and three tasks for it, for tests of continual learning."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import tuning_site as site

from seamount.models.locate import locate_model
from seamount.models.saving import companions, save_folder

ANSWERS = {"first": "red", "second": "blue", "third": "green"}


def records(task_id: str, count: int = 10) -> list[dict[str, Any]]:
    """Questions of one task, all with its answer."""
    asked = [f"{task_id}: number {index}?" for index in range(count)]
    return [{"prompt": text, "completion": ANSWERS[task_id]} for text in asked]


def tasks(*task_ids: str) -> list[dict[str, Any]]:
    """Tasks as callers give them; the first has held-out records."""
    return [
        {"task_id": task_id, "data": records(task_id)}
        | ({"evaluation": records(task_id, 13)[10:]} if not place else {})
        for place, task_id in enumerate(task_ids or ANSWERS)
    ]


def write_model(folder: Path) -> Path:
    """A folder with random weights of the tests' shape, and the embedded model's tokenizer and template."""
    folder.mkdir()
    for path in companions(locate_model("seamount-tiny")):
        shutil.copyfile(path, folder / path.name)
    model = site.network(vocab_size=4096)
    config = site.shape(vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    save_folder(folder, config, dict(model.named_parameters()) | dict(model.named_buffers()), torch.float32)
    return folder
