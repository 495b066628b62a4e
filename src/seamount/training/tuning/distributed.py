"""Several processes that train one network: started by `torchrun`, one rank each. Called by `pipeline` and `trainer`.

`ddp` keeps the whole network in every rank and adds up fp32 gradients once per step; `fsdp` (torch's FSDP2) shares
weights, gradients and optimizer out. Gloo on CPUs, NCCL on GPUs. Without torchrun there is one rank, and nothing here
does anything. What happens when a rank fails is in `failures`.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from seamount.core.errors import ConfigError
from seamount.core.settings import ranks
from seamount.models.network import CausalLM

_BUCKET_VALUES = 16 * 2**20
_TIMEOUT = timedelta(minutes=10)
# While one rank reads data or answers evaluation examples, the others wait; a process that ends is noticed at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class World:
    """This rank and the others.

    Attributes:
        rank, size: number of this process, from 0, and how many there are.
        device: what this rank computes on.
        processes: ids of those ranks' processes that can be seen from here, by rank.
    """

    rank: int
    size: int
    device: torch.device
    processes: Mapping[int, int] = field(default_factory=dict)
    _patient: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device_name: str) -> World:
        """Meet the other ranks that torchrun started, if it did.

        Args:
            device_name: `cpu`, `cuda`, or `auto`, which is a GPU where there is one.

        Raises:
            ConfigError: there is no such device, or the others cannot be met.
        """
        rank, size, local_rank = ranks()
        device = _device(device_name, local_rank)
        if size == 1:
            return cls(rank, size, device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
            patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
            processes = _visible(size, patient)
        except (RuntimeError, ValueError) as cause:
            raise ConfigError(
                f"Rank {rank} cannot meet the other {size - 1}: {str(cause).partition(chr(10))[0]}",
                hint="Start all of them with torchrun, with a --master-port that nothing else uses.",
            ) from cause
        return cls(rank, size, device, processes, patient)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def leave(self) -> None:
        """Part from the others. Idempotent."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Return when all ranks are here, however long that takes."""
        if self.size > 1:
            dist.barrier(group=self._patient)

    def agree(self, given: Mapping[str, str]) -> None:
        """See that all ranks were given the same, by name; takes as long as the slowest.

        Raises:
            ConfigError: on every rank, where they were not: names what differs, and a rank that has another.
        """
        if self.size == 1:
            return
        for name, found in zip(
            given, _gathered(list(given.values()), self.size, self._patient).T.tolist(), strict=True
        ):
            other = next((rank for rank, digest in enumerate(found) if digest != found[0]), None)
            if other is not None:
                raise ConfigError(
                    f"Rank {other} was started with another {name} than rank 0.",
                    hint="Start all ranks with the same command, on an output folder and data that all of them see.",
                )

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
            for module in _of_another_type(layer):
                fully_shard(module, mesh=mesh, mp_policy=policy)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_whole(model: nn.Module, world: World) -> None:
    """Put whole weights back where they are shared out: the first rank has them all then, the others none.

    Every rank must ask. The network can be written then, and no longer be trained.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                gathered = whole(parameter.detach())
                kept = gathered if world.is_main else gathered.new_empty(0)
                made[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])


def _of_another_type(layer: nn.Module) -> list[nn.Module]:
    """The modules whose trained weights are not of the layer's usual type, as routers kept in fp32: FSDP2 shares out
    weights of one type together.
    """
    counts = Counter(p.dtype for p in layer.parameters() if p.requires_grad)
    usual = max(counts, key=lambda dtype: counts[dtype], default=None)
    return [
        module
        for module in layer.modules()
        if any(p.requires_grad and p.dtype != usual for p in module.parameters(recurse=False))
    ]


def _device(name: str, local_rank: int) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("The recipe asks for a GPU, and torch sees none.", hint="Set device: auto.")
    if name == "cpu" or not has_gpu:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"Process {local_rank + 1} on this machine has no GPU of its own: torch sees {count}.",
            hint=f"Start at most {count} here (--nproc-per-node {count}), or set device: cpu.",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _gathered(texts: Sequence[str], size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Digests of every rank's texts, `[size, len(texts)]` int64."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    mine = torch.tensor([int.from_bytes(digest, signed=True) for digest in digests])
    found = torch.empty(size, len(texts), dtype=torch.int64)
    dist.all_gather(list(found.unbind()), mine, group=group)
    return found


def _visible(size: int, group: dist.ProcessGroup | None) -> dict[int, int]:
    """Process ids by rank, of those on this machine that can be seen from here."""
    own = torch.tensor([os.getpid()])
    ids = torch.empty(size, 1, dtype=torch.int64)
    dist.all_gather(list(ids.unbind()), own, group=group)
    machines = _gathered([socket.gethostname()], size, group)
    dist.barrier(group=group)
    is_here = (machines == machines[dist.get_rank()]).flatten().tolist()
    return {rank: int(pid) for rank, pid in enumerate(ids) if is_here[rank] and psutil.pid_exists(int(pid))}


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
