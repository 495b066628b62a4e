"""Several processes that train one network: started by `torchrun`, one rank each. Called by `pipeline` and `trainer`.

`ddp` keeps the whole network in every rank and adds up fp32 gradients once per step; `fsdp` (torch's FSDP2) shares
weights, gradients and optimizer out. Gloo on CPUs, NCCL on GPUs. Without torchrun there is one rank, and nothing here
does anything. A rank that fails leaves a note in the run's folder, so that the others can say who failed and of what.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from seamount.core.errors import ConfigError, EngineError, SeamountError
from seamount.core.settings import ranks
from seamount.models.network import CausalLM

_BUCKET_VALUES = 16 * 2**20
_TIMEOUT = timedelta(minutes=10)
_NOTE_WAIT_S = 5.0
# What gloo's and NCCL's errors say when a peer is gone or does not answer.
_COLLECTIVE = re.compile(r"(?i)gloo|nccl|closed by peer|reset by peer|broken pipe|timed out|process ?group")


class RankFailedError(EngineError):
    """Another rank failed, and with it the run."""

    code = "rank_failed"


@dataclass(frozen=True, slots=True)
class World:
    """This rank and the others.

    Attributes:
        rank, size: number of this process, from 0, and how many there are.
        device: what this rank computes on.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device_name: str) -> World:
        """Meet the other ranks that torchrun started, if it did.

        Args:
            device_name: `cpu`, `cuda`, or `auto`, which is a GPU where there is one.

        Raises:
            ConfigError: there is no such device.
        """
        rank, size, local_rank = ranks()
        has_gpu = torch.cuda.is_available()
        if device_name == "cuda" and not has_gpu:
            raise ConfigError("The recipe asks for a GPU, and torch sees none.", hint="Set device: auto.")
        device = torch.device("cpu")
        if has_gpu and device_name != "cpu":
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
        return cls(rank, size, device)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def leave(self) -> None:
        """Part from the others. Idempotent."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; those that FSDP shares out are added up already."""
        whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
        if self.size == 1 or not whole:
            return
        for bucket in _buckets(whole):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def sums(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        told = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(told)
        return told.tolist()

    def share_out(self, root: nn.Module, model: CausalLM) -> None:
        """Share a network's weights out over all ranks (FSDP2): a layer at a time, and `root` for what is left."""
        if self.size == 1:
            return
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
        # An MTP block is more than its layer's `forward`; what is around the layer goes with the root.
        for layer in [*model.layers, *(block.layer for block in model.mtp)]:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def note_failure(folder: Path, world: World, error: BaseException) -> None:
    """Leave word of why this rank failed, for the others."""
    if world.size > 1 and not isinstance(error, RankFailedError):
        text = str(error) if isinstance(error, SeamountError) else f"{type(error).__name__}: {error}"
        partial = folder / f".failed-rank-{world.rank}.tmp"
        partial.write_text(json.dumps({"rank": world.rank, "cause": text}), encoding="utf-8")
        partial.replace(folder / f"failed-rank-{world.rank}.json")


def failure_of_others(folder: Path, world: World, error: RuntimeError) -> RankFailedError | None:
    """Say which rank failed and of what, where `error` is a collective operation that ended for it; else None."""
    if world.size == 1 or not _COLLECTIVE.search(str(error)):
        return None
    until = time.monotonic() + _NOTE_WAIT_S
    while True:
        notes = [path for path in folder.glob("failed-rank-*.json") if path.name != f"failed-rank-{world.rank}.json"]
        if notes or time.monotonic() > until:
            break
        time.sleep(0.1)
    if not notes:
        return RankFailedError(
            "Another rank ended without a word: it was killed, or its machine is gone.",
            hint="Go on with --resume auto.",
        )
    told = json.loads(min(notes).read_text(encoding="utf-8"))
    return RankFailedError(f"Rank {told['rank']} failed: {told['cause']}", hint="Go on with --resume auto.")


def forget_failures(folder: Path) -> None:
    """Remove the notes of an earlier start."""
    for path in folder.glob("failed-rank-*.json"):
        path.unlink(missing_ok=True)


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        fits = sum(t.numel() for t in bucket) + tensor.numel() <= _BUCKET_VALUES
        if bucket and (not fits or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
