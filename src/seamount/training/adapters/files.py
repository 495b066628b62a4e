"""An adapter's files: PEFT's two, written from a network and read into one.

What is written loads with `peft` onto transformers' model of the same checkpoint, and the other way round. Two things
are as PEFT needs them for DeepSeek's models, whose expert names it would take for those of the stacked experts (peft
0.21): gate, up and down of dense layers and shared experts are filed as `target_parameters`, and the file then says
`lora_dropout` 0, which PEFT asks for beside parameters. Reading itself is in `models.adapter`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from seamount.models.adapter import PREFIX, STACKED_FIRST, WEIGHTS_NAME, Adapter, LowRank, adaptable_modules
from seamount.models.adapter_config import CONFIG_NAME
from seamount.models.config import ModelConfig
from seamount.models.network import CausalLM

from .layers import Part
from .lora import AdapterFields, adapter_parts, insert
from .targets import group_of, shortest_names


def save_adapter(model: CausalLM, folder: Path, section: AdapterFields, base: str) -> None:
    """Write a network's adapter into `folder`, each file beside its place and then renamed into it.

    Args:
        section: its dropout is noted; ranks and scales are those of the network's layers.
        base: name, or path, of the model that the adapter is for.
    """
    parts, tensors = [], {}
    stacks = {part.name for part, _, _ in adapter_parts(model) if group_of(part.name) == "experts"}
    for part, a, b in adapter_parts(model):
        parts.append(part)
        filed = f"{PREFIX}{_filed_name(part.name, stacks)}"
        if part.name in stacks:  # ranks within experts in A, experts within ranks in B
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        tensors[f"{filed}.lora_A.weight"] = a.detach().to("cpu", torch.float32).contiguous().clone()
        tensors[f"{filed}.lora_B.weight"] = b.detach().to("cpu", torch.float32).contiguous().clone()
    if not parts:
        raise ValueError("the network has no adapter")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS_NAME}.tmp"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    _take_name(partial, folder / WEIGHTS_NAME)
    described = json.dumps(_described(model.config, parts, section, base), indent=2, sort_keys=True)
    partial = folder / f"{CONFIG_NAME}.tmp"
    partial.write_text(described + "\n", encoding="utf-8")
    _take_name(partial, folder / CONFIG_NAME)


def load_adapter(model: CausalLM, folder: Path, *, name: str | None = None, dropout: float = 0.0) -> dict[str, int]:
    """Put an adapter from a folder into a network that has none, to be trained further, and freeze all else.

    Args:
        name: of the network's model; compared with the adapter's base, where it is given.
        dropout: of the adapter's input, while training.

    Returns:
        Trainable parameters by group, in the network's order.

    Raises:
        CheckpointError: the folder is broken, or belongs to another model; names file and tensor.
    """
    adapter = Adapter.from_folder(folder)
    adapter.check(model.config, adapter.config.base or "" if name is None else name)
    modules = _stacked(adapter, model.config)
    ranks = {name: (module.rank, module.alpha) for name, module in modules.items()}
    insert(model, ranks, dropout=dropout, use_rslora=adapter.config.use_rslora)
    counts: Counter[str] = Counter()
    with torch.no_grad():
        for part, a, b in adapter_parts(model):
            a.copy_(modules[part.name].a)
            b.copy_(modules[part.name].b)
            counts[group_of(part.name)] += a.numel() + b.numel()
    return dict(counts)


def _filed_name(name: str, stacks: set[str]) -> str:
    """PEFT wraps the experts' module once for each parameter, gate_up_proj inside, and names them by the wrappers."""
    if name not in stacks:
        return name
    experts, _, leaf = name.rpartition(".")
    is_inner = leaf == STACKED_FIRST and f"{experts}.down_proj" in stacks
    return f"{experts}.base_layer" if is_inner else experts


def _described(config: ModelConfig, parts: list[Part], section: AdapterFields, base: str) -> dict[str, Any]:
    every = adaptable_modules(config)
    as_parameters = {name for name in every if group_of(name) == "experts" or (config.experts and ".mlp." in name)}
    asked = {name if len(shape) == 3 else f"{name}.weight": name for name, shape in every.items()}
    named = {name: asked_for for asked_for, name in asked.items()}
    modules = [part.name for part in parts if part.name not in as_parameters]
    parameters = [named[part.name] for part in parts if part.name in as_parameters]
    (rank, alpha), _ = Counter((part.rank, part.alpha) for part in parts).most_common(1)[0]
    other = [part for part in parts if (part.rank, part.alpha) != (rank, alpha)]

    def pattern_of(part: Part) -> str:
        return (named[part.name] if part.name in as_parameters else part.name).replace(".", r"\.")

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {pattern_of(part): part.rank for part in other if part.rank != rank},
        "alpha_pattern": {pattern_of(part): _number(part.alpha) for part in other if part.alpha != alpha},
        "use_rslora": parts[0].use_rslora,
        "lora_dropout": 0.0 if parameters else section.dropout,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": shortest_names(modules, every),
        "target_parameters": shortest_names(parameters, named.values()) or None,
    }


def _stacked(adapter: Adapter, config: ModelConfig) -> dict[str, LowRank]:
    """The adapter's modules with those of single experts put together: what is not adapted is zero, and a pair of gate
    and up, each with an A of its own, becomes one of twice the rank.
    """
    modules = {name: module for name, module in adapter.modules.items() if name in adaptable_modules(config)}
    for name, shape in adaptable_modules(config).items():
        if len(shape) == 2 or name in modules:
            continue
        experts, _, leaf = name.rpartition(".")
        halves = ("gate_proj", "up_proj") if leaf == STACKED_FIRST else ("down_proj",)
        found = [[adapter.modules.get(f"{experts}.{e}.{half}") for half in halves] for e in range(shape[0])]
        present = [module for row in found for module in row if module is not None]
        if not present:
            continue
        rank = max(module.rank for module in present)
        total, height = rank * len(halves), shape[1] // len(halves)
        a, b = torch.zeros(shape[0], total, shape[2]), torch.zeros(*shape[:2], total)
        # Scales of single experts may differ: what one has beside the first goes into its B.
        first = present[0]
        alpha = first.alpha * _alpha_factor(first.rank, total, use_rslora=adapter.config.use_rslora)
        for expert, row in enumerate(found):
            for number, module in enumerate(row):
                if module is not None:
                    at = slice(number * rank, number * rank + module.rank)
                    a[expert, at] = module.a.float()
                    b[expert, number * height : (number + 1) * height, at] = module.b.float() * (
                        module.scale / first.scale
                    )
        modules[name] = LowRank(a, b, first.scale, alpha)
    return modules


def _alpha_factor(rank: int, total: int, *, use_rslora: bool) -> float:
    """What alpha grows by where the rank grows and the scale stays."""
    return (total / rank) ** (0.5 if use_rslora else 1.0)


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _take_name(partial: Path, path: Path) -> None:
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
