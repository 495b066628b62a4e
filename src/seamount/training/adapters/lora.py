"""LoRA (Hu et al., arXiv 2106.09685) on a network: chooses the projections, puts the layers in, counts what is trained.

Called by the trainer's caller, and by `files` for adapters that exist already. Everything but the adapters is frozen.
B begins at zero, so that the network's outputs are at first, to the bit, what they were without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from seamount.models.keymap import Placement, placements
from seamount.models.network import CausalLM

from .layers import AdaptedExperts, AdaptedLinear, Part, replace
from .targets import chosen_modules, group_of


class AdapterFields(Protocol):
    """What of a recipe's section `adapter` is read here."""

    @property
    def method(self) -> Literal["lora", "qlora"]: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def use_rslora(self) -> bool: ...


def add_adapters(model: CausalLM, section: AdapterFields, *, seed: int) -> dict[str, int]:
    """Put fresh adapters into a network, in place, and freeze all else.

    A is drawn uniformly within 1 / sqrt(columns), as PEFT does; the same for the same seed on every device.

    Returns:
        Trainable parameters by group, in the network's order.

    Raises:
        ConfigError: a target matches nothing; the hint lists what there is.
    """
    ranks = dict.fromkeys(chosen_modules(model.config, section.targets), (section.rank, float(section.alpha)))
    insert(model, ranks, dropout=section.dropout, use_rslora=section.use_rslora)
    generator = torch.Generator().manual_seed(seed)
    counts: dict[str, int] = {}
    for part, a, b in adapter_parts(model):
        bound = 1 / math.sqrt(a.shape[-1])
        with torch.no_grad():
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        group = group_of(part.name)
        counts[group] = counts.get(group, 0) + a.numel() + b.numel()
    return counts


def insert(
    model: CausalLM, ranks: dict[str, tuple[int, float]], *, dropout: float = 0.0, use_rslora: bool = False
) -> None:
    """Put adapters into a network, all zero, and freeze all else.

    Args:
        ranks: rank and alpha by PEFT's module name; routed experts stacked.
    """
    if adapter_parameters(model):
        raise ValueError("the network has an adapter already")
    model.requires_grad_(False)
    by_module: dict[str, list[Part]] = {}
    for place in _places(model, ranks):
        name = place.key.removesuffix(".weight")
        rank, alpha = ranks[name]
        part = Part(name, place.start_row, place.shape[-2], rank, alpha, use_rslora)
        by_module.setdefault(place.parameter.removesuffix(".weight"), []).append(part)
    for owner, parts in by_module.items():
        experts, _, leaf = owner.rpartition(".")
        if experts.endswith(".experts"):
            module = model.get_submodule(experts)
            if not isinstance(module, AdaptedExperts):
                module = AdaptedExperts(module)  # type: ignore[arg-type]
                replace(model, experts, module)
            module.add_part(leaf, parts[0], dropout=dropout, device=_device(model))
        else:
            linear = model.get_submodule(owner)
            if not isinstance(linear, AdaptedLinear):
                linear = AdaptedLinear(linear)  # type: ignore[arg-type]
                replace(model, owner, linear)
            linear.add_parts(parts, dropout=dropout, device=_device(model))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters, by name within the network."""
    return {name: value for name, value in model.named_parameters() if name.endswith(("lora_a", "lora_b"))}


def adapter_parts(model: nn.Module) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Every adapted projection, in the network's order, with views of its A and B: `[r, C]` and `[N, r]`, of stacked
    experts `[E, r, C]` and `[E, N, r]`.
    """
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            for index, part in enumerate(module.parts):
                yield part, *module.part(index)
        elif isinstance(module, AdaptedExperts):
            for leaf, part in module.parts.items():
                yield part, *module.part(leaf)


def _places(model: CausalLM, names: Iterable[str]) -> Iterator[Placement]:
    wanted = set(names)
    for place in placements(model.config, lambda key: True):
        if place.key.removesuffix(".weight") in wanted:
            yield place


def _device(model: CausalLM) -> torch.device:
    return model.embed_tokens.weight.device
