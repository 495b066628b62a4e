"""AdamW, or Muon, over fp32 weights for a network whose own weights may be 16-bit; clipping, loss scaling, an average.

Called by `trainer`. AdamW itself is torch's. Gradients of several micro-batches are added up in fp32, whatever the
network's type. It must not know the loss or the data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seamount.core.errors import CheckpointError
from seamount.training.muon import Muon, is_matrix

from .recipe import OptimizerSection

_FIRST_SCALE = 2.0**14
_SCALE_UP_AFTER = 1000
_MAX_SCALE, _MIN_SCALE = 2.0**24, 1.0


class Optimizer:
    """Updates a network's trainable weights in place.

    Args:
        parameters: those that are trained, by name.
        scales_loss: fp16: the loss is multiplied by `loss_scale` before the backward pass.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], section: OptimizerSection, *, scales_loss: bool = False
    ) -> None:
        self._section = section
        self._parameters = dict(parameters)
        # Weights that are fp32 already are their own masters.
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
        by_muon = {n: m for n, m in self.masters.items() if section.method == "muon" and is_matrix(n, m)}
        self._muon = Muon(by_muon, section.weight_decay)
        matrices = [m for n, m in self.masters.items() if m.ndim >= 2 and n not in by_muon]
        others = [m for m in self.masters.values() if m.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": section.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            fused=True,
        )
        self.average = {n: m.detach().clone() for n, m in self.masters.items()} if section.ema_decay else None
        self.num_updates = 0
        self.loss_scale = _FIRST_SCALE if scales_loss else 1.0
        self._scales = scales_loss
        self._num_good = 0

    @torch.no_grad()
    def gather(self) -> None:
        """Add what a backward pass left at the network's weights to the gradients of the masters."""
        for name, parameter in self._parameters.items():
            master = self.masters[name]
            if parameter is master or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The masters' gradients, by name; of those that have one."""
        return {name: m.grad for name, m in self.masters.items() if m.grad is not None}

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Apply and clear the gradients; return their norm before clipping (not a number: the step was left out).

        With loss scaling, gradients that overflowed leave the step out and halve the scale.
        """
        gradients = list(self.gradients().values())
        if self.loss_scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale)
        norm = _norm(gradients)
        if not torch.isfinite(norm):
            self._clear()
            self._num_good = 0
            if self._scales:
                self.loss_scale = max(self.loss_scale / 2, _MIN_SCALE)
            return float("nan")
        factor = float(self._section.clip_norm / (norm + 1e-6))
        if factor < 1.0:
            torch._foreach_mul_(gradients, factor)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._muon.step(learning_rate)
        self._clear()
        self.num_updates += 1
        self.publish()
        if self.average is not None and self._section.ema_decay is not None:
            # Early on the average follows faster, so that it does not remember the beginning for ever.
            decay = min(self._section.ema_decay, self.num_updates / (self.num_updates + 9))
            torch._foreach_lerp_(list(self.average.values()), [m.detach() for m in self.masters.values()], 1 - decay)
        self._grow_scale()
        return float(norm)

    def _grow_scale(self) -> None:
        self._num_good += 1
        if self._scales and self._num_good >= _SCALE_UP_AFTER:
            self.loss_scale, self._num_good = min(self.loss_scale * 2, _MAX_SCALE), 0

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the network's weights."""
        self._write(self.masters)

    @torch.no_grad()
    def publish_average(self) -> None:
        """Write the average into the network's weights, where one is kept; `publish` takes it back.

        Weights that are their own masters are exchanged with the average.
        """
        if self.average is None:
            return
        for name, parameter in self._parameters.items():
            if parameter is self.masters[name]:
                held = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(held)
            else:
                parameter.copy_(self.average[name])

    @torch.no_grad()
    def take_average_back(self) -> None:
        """Undo `publish_average`."""
        if self.average is None:
            return
        own = [name for name, parameter in self._parameters.items() if parameter is self.masters[name]]
        for name in own:
            held = self._parameters[name].detach().clone()
            self._parameters[name].copy_(self.average[name])
            self.average[name].copy_(held)
        self.publish()

    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(values[name])

    def _clear(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that a later `load_state` needs, by name; live tensors, which FSDP may have shared out."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state[f"master.{name}"] = master.detach()
            moments = self._adam.state.get(master, {})
            if moments:
                state[f"first.{name}"], state[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        state |= {f"first.{name}": momentum for name, momentum in self._muon.momentum.items()}
        if self.average is not None:
            state |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        return state

    def facts(self) -> dict[str, float]:
        """The numbers that belong to `state`."""
        return {"num_updates": self.num_updates, "loss_scale": self.loss_scale, "num_good": self._num_good}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], facts: Mapping[str, float]) -> None:
        """Go on from `state`; sets the network's weights too.

        Raises:
            CheckpointError: names or shapes are not this network's.
        """
        wanted = {f"master.{name}" for name in self.masters}
        if self.average is not None:
            wanted |= {f"average.{name}" for name in self.average}
        given = {name for name in state if name.startswith(("master.", "average."))}
        if given != wanted or any(state[f"master.{n}"].shape != m.shape for n, m in self.masters.items()):
            raise CheckpointError(
                "The checkpoint is of another network, adapter or optimizer than the recipe's.",
                hint="Use another output folder, or the recipe that the run began with.",
            )
        by_adam = self.masters.keys() - self._muon.momentum.keys()
        if any(f"second.{n}" in state for n in self._muon.momentum) or any(
            f"first.{n}" in state and f"second.{n}" not in state for n in by_adam
        ):
            raise CheckpointError(
                "The checkpoint was made with another optimizer.method.",
                hint="Use the recipe that the run began with, or another output folder.",
            )
        self.num_updates = int(facts["num_updates"])
        self.loss_scale, self._num_good = float(facts["loss_scale"]), int(facts["num_good"])
        for name, master in self.masters.items():
            _fill(master, state[f"master.{name}"])
            if name in self._muon.momentum:
                _fill(self._muon.momentum[name], state[f"first.{name}"])
            elif f"first.{name}" in state:
                first, second = torch.zeros_like(master), torch.zeros_like(master)
                _fill(first, state[f"first.{name}"])
                _fill(second, state[f"second.{name}"])
                steps = torch.tensor(float(self.num_updates), device=master.device)
                self._adam.state[master] = {"step": steps, "exp_avg": first, "exp_avg_sq": second}
        for name, average in (self.average or {}).items():
            _fill(average, state[f"average.{name}"])
        self.publish()


def _fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be this rank's share of it."""
    if isinstance(target, DTensor):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    target.copy_(whole)


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm over all gradients and, where they are shared out, over all ranks."""
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    norm = torch.linalg.vector_norm(torch.stack(list(norms)))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
