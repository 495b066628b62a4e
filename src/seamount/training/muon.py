"""Muon: what changes the matrices of a network that is trained from nothing or nearly so.

Called by the optimizers of `pretraining` and of `tuning`, each beside Adam for what is no matrix. It replaces the
momentum of a matrix by the nearest orthogonal matrix (Jordan et al., 2024), at the size of Adam's updates, so that one
learning rate serves both (Liu et al., 2025, arXiv 2502.16982). It must not know the loss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

# Quintic of Newton-Schulz whose slope at zero is steep: five rounds bring singular values of 1e-3 close to 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_SCALE = 0.2
_NOT_MATRICES = ("embed_tokens", "lm_head", "gate.weight")


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether Muon takes this parameter."""
    return tensor.ndim >= 2 and not any(part in name for part in _NOT_MATRICES)


class Muon:
    """Updates matrices in place from their `grad`.

    Args:
        matrices: fp32, by parameter name: 2D, or stacks of such in 3D.
        weight_decay: decoupled.
        decay: of the momentum, 0 to 1.

    Attributes:
        momentum: by parameter name; live tensors, which a checkpoint must hold.
    """

    def __init__(self, matrices: Mapping[str, Tensor], weight_decay: float, *, decay: float = 0.95) -> None:
        self._matrices, self._weight_decay, self._decay = dict(matrices), weight_decay, decay
        self.momentum = {name: torch.zeros_like(matrix) for name, matrix in self._matrices.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply the gradients; matrices without one stay as they are."""
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, matrix in self._matrices.items():
            if matrix.grad is not None:
                self.momentum[name].lerp_(matrix.grad, 1 - self._decay)
                by_shape[_split(name, matrix).shape[-2:]].append(name)
        for names in by_shape.values():  # matrices of one shape are made orthogonal together
            self._update(names, learning_rate)

    def _update(self, names: list[str], learning_rate: float) -> None:
        # Nesterov: a step further than the momentum is.
        parts = [_split(name, self._gradient(name).lerp(self.momentum[name], self._decay)) for name in names]
        updates = orthogonalize(torch.cat(parts))
        scale = _SCALE * max(updates.shape[-2:]) ** 0.5
        for name, update in zip(names, updates.split([len(part) for part in parts]), strict=True):
            matrix = self._matrices[name]
            matrix.mul_(1 - learning_rate * self._weight_decay)
            matrix.sub_(update.reshape(matrix.shape), alpha=learning_rate * scale)

    def _gradient(self, name: str) -> Tensor:
        gradient = self._matrices[name].grad
        if gradient is None:
            raise ValueError(f"{name} has no gradient")
        return gradient


def _split(name: str, tensor: Tensor) -> Tensor:
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
