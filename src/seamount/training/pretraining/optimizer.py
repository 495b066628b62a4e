"""Muon and Adam over fp32 master weights, for a network whose own weights may be bf16. Called by `loop`.

It must not know the loss or the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from seamount.core.errors import CheckpointError
from seamount.training.muon import Muon, is_matrix
from seamount.training.pretraining.recipe import OptimizerSection

_ADAM_EPS = 1e-8


class Optimizer:
    """Updates the network's weights in place.

    Matrices (2D, and stacks of them in 3D) go to Muon; embedding, head, routers and norms to Adam.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], section: OptimizerSection) -> None:
        self._section = section
        self._parameters = dict(parameters)
        self._masters = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        by_muon = {name: m for name, m in self._masters.items() if is_matrix(name, m)}
        self._muon = Muon(by_muon, section.weight_decay, decay=section.momentum)
        by_adam = {name: m for name, m in self._masters.items() if name not in by_muon}
        self._first = self._muon.momentum | {name: torch.zeros_like(m) for name, m in by_adam.items()}
        self._second = {name: torch.zeros_like(m) for name, m in by_adam.items()}
        self._num_updates = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Apply and clear the gradients; parameters without one stay as they are. Returns the norm before clipping."""
        gradients = {name: p.grad.float() for name, p in self._parameters.items() if p.grad is not None}
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        factor = min(1.0, self._section.clip_norm / (norm + 1e-6))
        self._num_updates += 1
        for name, gradient in gradients.items():
            gradient.mul_(factor)
            if name in self._second:
                self._adam(name, gradient, learning_rate)
            else:
                self._masters[name].grad = gradient
        self._muon.step(learning_rate)
        for name in gradients:
            self._parameters[name].copy_(self._masters[name])
            self._parameters[name].grad = self._masters[name].grad = None
        return norm

    def _adam(self, name: str, gradient: Tensor, learning_rate: float) -> None:
        s, first, second = self._section, self._first[name], self._second[name]
        first.lerp_(gradient, 1 - s.beta1)
        second.lerp_(gradient.square(), 1 - s.beta2)
        corrected = second / (1 - s.beta2**self._num_updates)
        rate = learning_rate / (1 - s.beta1**self._num_updates)
        self._masters[name].sub_(first / (corrected.sqrt_() + _ADAM_EPS), alpha=rate)

    def state(self) -> dict[str, Tensor]:
        """All that a later `load_state` needs, by name; the tensors are the live ones."""
        groups = {"master": self._masters, "first": self._first, "second": self._second}
        state = {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        state["num_updates"] = torch.tensor([self._num_updates])
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; sets the network's weights too. Raises CheckpointError where names or shapes differ."""
        mine = self.state()
        if mine.keys() != state.keys() or any(mine[name].shape != state[name].shape for name in mine):
            raise CheckpointError(
                "The checkpoint's optimizer state is of another network.", hint="Use another run_folder, or its recipe."
            )
        self._num_updates = int(state["num_updates"])
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        for name, parameter in self._parameters.items():
            parameter.copy_(self._masters[name])

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights by parameter name."""
        return self._masters
