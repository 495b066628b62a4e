"""Muon and Adam over fp32 master weights, for a network whose own weights may be bf16. Called by `loop`.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix; its update is scaled to the
size of Adam's (Liu et al., 2025, arXiv 2502.16982), so that one learning rate serves both. It must not know the loss or
the data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from seamount.core.errors import CheckpointError
from seamount.training.pretraining.recipe import OptimizerSection

# Quintic of Newton-Schulz whose slope at zero is steep: five rounds bring singular values of 1e-3 close to 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_MUON_SCALE = 0.2
_ADAM_EPS = 1e-8
_NOT_MATRICES = ("embed_tokens", "lm_head", "gate.weight")


class Optimizer:
    """Updates the network's weights in place.

    Matrices (2D, and stacks of them in 3D) go to Muon; embedding, head, routers and norms to Adam.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], section: OptimizerSection) -> None:
        self._section = section
        self._parameters = dict(parameters)
        self._masters = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._first = {name: torch.zeros_like(m) for name, m in self._masters.items()}
        self._second = {name: torch.zeros_like(m) for name, m in self._masters.items() if not is_matrix(name, m)}
        self._num_updates = 0
        self._shapes: dict[torch.Size, list[str]] = defaultdict(list)
        for name, master in self._masters.items():
            if is_matrix(name, master):
                self._shapes[_matrices(name, master).shape[-2:]].append(name)

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
                self._first[name].lerp_(gradient, 1 - self._section.momentum)
        for names in self._shapes.values():
            present = [name for name in names if name in gradients]
            if present:
                self._muon(present, gradients, learning_rate)
        for name in gradients:
            self._parameters[name].copy_(self._masters[name])
            self._parameters[name].grad = None
        return norm

    def _adam(self, name: str, gradient: Tensor, learning_rate: float) -> None:
        s, first, second = self._section, self._first[name], self._second[name]
        first.lerp_(gradient, 1 - s.beta1)
        second.lerp_(gradient.square(), 1 - s.beta2)
        corrected = second / (1 - s.beta2**self._num_updates)
        rate = learning_rate / (1 - s.beta1**self._num_updates)
        self._masters[name].sub_(first / (corrected.sqrt_() + _ADAM_EPS), alpha=rate)

    def _muon(self, names: list[str], gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Matrices of one shape, together."""
        momentum = self._section.momentum
        looked_ahead = [gradients[n].lerp(self._first[n], momentum) for n in names]  # Nesterov
        stack = torch.cat([_matrices(n, g) for n, g in zip(names, looked_ahead, strict=True)])
        rows, columns = stack.shape[-2:]
        update = orthogonalize(stack) * (_MUON_SCALE * max(rows, columns) ** 0.5)
        start = 0
        for name in names:
            master = self._masters[name]
            count = master.numel() // (rows * columns)
            master.mul_(1 - learning_rate * self._section.weight_decay)
            master.sub_(update[start : start + count].reshape(master.shape), alpha=learning_rate)
            start += count

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


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether Muon takes this parameter."""
    return tensor.ndim >= 2 and not any(part in name for part in _NOT_MATRICES)


def _matrices(name: str, tensor: Tensor) -> Tensor:
    """`[N, R, C]`: the matrices that a parameter consists of; the network stores gate and up as one."""
    rows, columns = tensor.shape[-2:]
    return tensor.reshape(-1, rows // 2 if "gate_up_proj" in name else rows, columns)


def orthogonalize(stack: Tensor) -> Tensor:
    """Per matrix of `stack [N, R, C]` (fp32), about U V^T of its singular value decomposition; computed in bf16."""
    a, b, c = _QUINTIC
    x = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()
