"""Which projections of a network an adapter is for: groups and names, as a recipe gives them, to PEFT's module names.

Used by `lora` and `files`. A leaf name such as `down_proj` means every projection of this name but the routed experts',
of which a layer has hundreds: those are asked for by `experts`, or by a name that says so (`experts.down_proj`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from seamount.core.errors import ConfigError
from seamount.models.adapter import adaptable_modules
from seamount.models.config import ModelConfig

HEAD = "lm_head"
LINEAR = "linear"
"""All projections that every token passes: attention, dense and shared feed-forward networks, whatever a model has."""
_EXPERTS = "experts."
_PLACES = ((".mlp.experts.", "experts"), (".mlp.shared_experts.", "shared"), (".mlp.", "dense"))


def group_of(name: str) -> str:
    """The group of a module: `attention`, `dense`, `shared`, `experts`; the head is its own."""
    if name == HEAD:
        return HEAD
    return next((group for place, group in _PLACES if place in name), "attention")


def chosen_modules(config: ModelConfig, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The modules that targets mean, in the network's order, with the shapes of their weights.

    Args:
        targets: groups (`linear` is a group of groups), names, or ends of names (`q_proj`, `self_attn.q_proj`,
            `model.layers.0.mlp.up_proj`).

    Raises:
        ConfigError: one of them means nothing here; the hint lists what there is.
    """
    modules = adaptable_modules(config)
    for target in targets:
        if not any(_means(target, name) for name in modules):
            raise ConfigError(
                f"The adapter's target {target!r} matches nothing in this {config.family} model.",
                hint=f"There are: {', '.join(_known(modules))}.",
            )
    return {name: shape for name, shape in modules.items() if any(_means(target, name) for target in targets)}


def shortest_names(chosen: Iterable[str], of_all: Iterable[str]) -> list[str]:
    """Ends of names that mean the chosen ones among all, and no other: as short as they can be."""
    wanted = set(chosen)
    others = [name for name in of_all if name not in wanted]
    found = set()
    for name in sorted(wanted):
        words = name.split(".")
        ends = (".".join(words[start:]) for start in reversed(range(len(words))))
        found.add(next(end for end in ends if not any(_ends_with(other, end) for other in others)))
    return sorted(found)


def _means(target: str, name: str) -> bool:
    group = group_of(name)
    if target in (group, LINEAR if group in ("attention", "dense", "shared") else group):
        return True
    if group_of(name) == "experts" and _EXPERTS not in target:
        return False
    return _ends_with(name, target)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _known(modules: Mapping[str, object]) -> list[str]:
    groups = dict.fromkeys(group_of(name) for name in modules)
    leaves = {
        name.rpartition(".mlp.")[2] if group_of(name) == "experts" else name.rpartition(".")[2]: None
        for name in modules
    }
    return [LINEAR, *groups, *(leaf for leaf in leaves if leaf not in groups)]
