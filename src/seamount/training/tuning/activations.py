"""Activation checkpointing: of each layer only its input is kept, and the rest computed again in the backward pass.

Called by `trainer`. Routers are pinned to what they chose the first time, and dropout draws the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seamount.models.layers import Router
from seamount.models.network import CausalLM

from .routing import routers_of


def checkpoint_activations(model: CausalLM) -> None:
    """Change the network's layers, its MTP block's too, so that they keep their inputs only."""
    layers = [*model.layers, *(block.layer for block in model.mtp)]
    for layer in layers:
        layer.forward = partial(_forward, layer.forward, routers_of(layer))


def _forward(inner: Callable[..., Tensor], routers: list[Router], x: Tensor, *rest: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return inner(x, *rest)
    return checkpoint(inner, x, *rest, use_reentrant=False, context_fn=partial(_contexts, routers))


def _contexts(routers: list[Router]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    chosen: list[Tensor] = []
    return _noting(routers, chosen), _pinning(routers, chosen)


@contextmanager
def _noting(routers: list[Router], chosen: list[Tensor]) -> Iterator[None]:
    hooks = [r.register_forward_hook(lambda _r, _x, out: chosen.append(out[1].detach())) for r in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _pinning(routers: list[Router], chosen: list[Tensor]) -> Iterator[None]:
    for router, ids in zip(routers, chosen, strict=True):
        router.pinned = ids
    try:
        yield
    finally:
        for router in routers:
            router.pinned = None
