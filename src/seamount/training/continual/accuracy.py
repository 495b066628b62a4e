"""How well a network answers each task, and what became of that over time: the accuracy matrix. Called by `pipeline`.

It must not know how tasks are learned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seamount.models.network import CausalLM
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import Dataset
from seamount.training.shards.packing import pack
from seamount.training.tuning.distributed import World
from seamount.training.tuning.loss import guesses
from seamount.training.tuning.state_files import sync_folder, write_synced

ACCURACY_NAME = "accuracy.json"
_ROWS_AT_ONCE = 1024


@torch.no_grad()
def num_right(model: CausalLM, data: Dataset, *, micro_tokens: int, world: World) -> int:
    """To how many examples the greedy answer is, token for token, the last trained stretch; ranks share them.

    Nothing is generated: the greedy answer is the wanted one if, and only if, at each of its tokens the likeliest is
    the wanted one, given those before. So it costs one forward pass. An example with reasoning asks for the very
    reasoning.
    """
    model.eval()
    asked = [(index, _asked(data.example(index))) for index in range(len(data))]
    right = 0
    for micro in pack(asked, micro_tokens=micro_tokens, rank=world.rank, world_size=world.size):
        if micro.is_filler:
            continue
        moved = micro.to(world.device)
        found = guesses(moved)
        hidden = model.norm(model.hidden_states(moved.batch(), None).index_select(0, found.rows))
        likeliest = torch.cat([model.logits(part).argmax(dim=-1) for part in hidden.split(_ROWS_AT_ONCE)])
        wrong = found.rows[likeliest != found.targets].cpu().numpy()
        right += len(micro.indices) - len(np.unique(np.searchsorted(micro.starts, wrong, side="right")))
    (total,) = world.sums(float(right))
    return int(total)


def _asked(example: Example) -> Example:
    """The example with nothing but its last trained stretch in the loss."""
    trained = np.flatnonzero(example.trained)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    flags = example.trained.copy()
    flags[: trained[gaps[-1] + 1] if len(gaps) else 0] = False
    return replace(example, trained=flags)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What was known after each task.

    Attributes:
        tasks: ids, in the order in which they were learned.
        matrix: row i holds the accuracy (0 to 1) on tasks 0 to i when task i had been learned.
    """

    tasks: tuple[str, ...] = ()
    matrix: tuple[tuple[float, ...], ...] = ()

    @property
    def average(self) -> float | None:
        """Mean accuracy over all tasks now; None before the first."""
        return float(np.mean(self.matrix[-1])) if self.matrix else None

    @property
    def forgetting(self) -> float | None:
        """Mean over all tasks but the last of the best accuracy there ever was less that of now; None for one task.

        Chaudhry et al., "Riemannian Walk for Incremental Learning" (ECCV 2018, arXiv 1801.10112), section 3.
        """
        if len(self.matrix) < 2:
            return None
        last, earlier = self.matrix[-1], self.matrix[:-1]
        return float(np.mean([max(row[j] for row in earlier[j:]) - last[j] for j in range(len(earlier))]))

    @property
    def backward_transfer(self) -> float | None:
        """Mean over all tasks but the last of the accuracy now less that when the task had been learned.

        Lopez-Paz and Ranzato, "Gradient Episodic Memory" (NIPS 2017, arXiv 1706.08840), equation 3. None for one task.
        """
        if len(self.matrix) < 2:
            return None
        last, earlier = self.matrix[-1], self.matrix[:-1]
        return float(np.mean([last[j] - row[j] for j, row in enumerate(earlier)]))

    def to_fields(self) -> dict[str, Any]:
        """As JSON has it: a square matrix, null where a task had not been learned yet."""
        size = len(self.tasks)
        return {
            "tasks": list(self.tasks),
            "matrix": [[*row, *[None] * (size - len(row))] for row in self.matrix],
            "average": self.average,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
        }

    def write(self, folder: Path) -> None:
        """Write `accuracy.json`."""
        replace_file(folder / ACCURACY_NAME, self.to_fields())


def replace_file(path: Path, value: Any) -> None:
    """Write JSON beside the file, bring it to the disk, and put it in the file's place. Raises OSError."""
    partial = path.with_name(path.name + ".tmp")
    partial.unlink(missing_ok=True)
    write_synced(partial, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
    partial.replace(path)
    sync_folder(path.parent)
