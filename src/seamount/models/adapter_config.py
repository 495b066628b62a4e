"""What adapter_config.json of a PEFT folder says, as far as it means anything for LoRA; the rest is refused by name.

Read by `models.adapter`. The format is that of the package `peft` (`LoraConfig`, versions 0.4 to 0.21). The file is
untrusted: values are checked, and patterns, which are regular expressions there, must be ones that cannot run away.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seamount.core.errors import CheckpointError, UnsupportedModelError

from .checkpoint import shown
from .tokenizer import read_json_object

CONFIG_NAME = "adapter_config.json"

# Settings that change nothing of what a trained LoRA computes, or that are read below.
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "parent_library", "base_model_class", "revision"),
    *("base_model_name_or_path", "inference_mode", "runtime_config", "megatron_core", "qalora_group_size"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias", "velora_config"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config"),
}
# Ways to begin that take something away from the base model: tensors then mean nothing beside the model as it was.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_MOST_RANK = 2**16
_LONGEST_PATTERN, _MOST_REPEATS = 300, 4


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter.

    Attributes:
        path: of the file.
        base: `base_model_name_or_path`, or None.
        rank, alpha: of every module that no pattern names.
        rank_pattern, alpha_pattern: what other modules have, by pattern of their names; the first that matches holds.
        use_rslora: the factor is alpha / sqrt(rank) (arXiv 2312.03732), not alpha / rank.
        target_modules: names, or ends of names, that PEFT adapts; None where it is a pattern or not all are meant.
        target_parameters: the same of parameters, such as stacked experts.
    """

    path: Path
    base: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    use_rslora: bool
    target_modules: tuple[str, ...] | None
    target_parameters: tuple[str, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> AdapterConfig:
        """Read and check the file.

        Raises:
            CheckpointError: it is missing, broken, or holds values that make no sense.
            UnsupportedModelError: it describes something else than a plain LoRA; the message names the setting.
        """
        path = folder / CONFIG_NAME
        raw = read_json_object(path)
        if raw is None:
            raise CheckpointError(
                f"{folder} holds no {CONFIG_NAME}, so it is no adapter.",
                hint="Give a folder as PEFT writes it, with adapter_config.json and adapter_model.safetensors.",
            )
        _refuse_foreign(raw, path)
        rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
        for name, value, is_right in (("r", rank, _is_rank), ("lora_alpha", alpha, _is_alpha)):
            if not is_right(value):
                raise CheckpointError(f"{path}: {name} is {shown(str(value))}.")
        some_only = raw.get("exclude_modules") or raw.get("layers_to_transform") is not None
        modules = raw.get("target_modules")
        if not isinstance(modules, str | None):
            modules = _names(modules, "target_modules", path)
        base = raw.get("base_model_name_or_path")
        return cls(
            path=path,
            base=base if isinstance(base, str) and base else None,
            rank=rank,
            alpha=float(alpha),
            rank_pattern=_patterns(raw.get("rank_pattern"), "rank_pattern", path, _is_rank),
            alpha_pattern=_patterns(raw.get("alpha_pattern"), "alpha_pattern", path, _is_alpha),
            use_rslora=bool(raw.get("use_rslora")),
            target_modules=None if some_only or not isinstance(modules, tuple) else modules,
            target_parameters=_names(raw.get("target_parameters") or [], "target_parameters", path),
        )

    def rank_of(self, name: str) -> int:
        """The rank of the module, or parameter, of this name."""
        return _matched(self.rank_pattern, self._told(name), self.rank)

    def alpha_of(self, name: str) -> float:
        """Its alpha."""
        return _matched(self.alpha_pattern, self._told(name), self.alpha)

    def is_parameter(self, name: str) -> bool:
        """Whether `target_parameters` asks for it; PEFT then speaks of a linear layer by its weight's name."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def _told(self, name: str) -> str:
        return f"{name}.weight" if self.is_parameter(f"{name}.weight") else name


def scale_of(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """What the product of the two matrices is multiplied by."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _refuse_foreign(raw: Mapping[str, Any], path: Path) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{path}: peft_type is {shown(str(kind))}; only LORA is supported.",
            hint="Merge it with peft, and load that.",
        )
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedModelError(
            f"{path}: task_type is {shown(str(raw['task_type']))}; only CAUSAL_LM is supported."
        )
    beginning = raw.get("init_lora_weights")
    foreign = [name for name, value in raw.items() if name not in _HARMLESS and value]
    if raw.get("bias", "none") != "none":
        foreign.append("bias")
    if isinstance(beginning, str) and beginning.lower().startswith(_CHANGES_BASE):
        foreign.append("init_lora_weights")
    if foreign:
        told = ", ".join(f"{shown(name)} = {shown(str(raw[name]))}" for name in sorted(foreign)[:3])
        raise UnsupportedModelError(
            f"{path} asks for what is not supported: {told}.",
            hint="Merge the adapter into its model with peft (merge_and_unload), and load the result.",
        )


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MOST_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(value: object, name: str, path: Path) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{path}: {name} must be a list of names.")
    return tuple(value)


def _patterns(value: object, name: str, path: Path, is_right: Any) -> dict[re.Pattern[str], Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(is_right(item) for item in value.values()):
        raise CheckpointError(f"{path}: {name} must give a number for each pattern.")
    found = {}
    for pattern, number in value.items():
        # A group that is repeated can take exponential time, and so can many repetitions after each other.
        runs_away = re.search(r"\)[*+?{]|\(\?", pattern) or len(re.findall(r"[*+?{]", pattern)) > _MOST_REPEATS
        if runs_away or len(pattern) > _LONGEST_PATTERN:
            raise UnsupportedModelError(
                f"{path}: {name} holds the pattern {shown(pattern)}, which is too intricate to be tried.",
                hint="Write the modules' names out.",
            )
        try:
            with warnings.catch_warnings():  # of what later versions of Python will read otherwise
                warnings.simplefilter("ignore")
                # PEFT's rule: a whole name, or what follows a dot in it.
                found[re.compile(rf"(.*\.)?({pattern})$")] = number
        except (re.error, RecursionError, OverflowError) as cause:
            raise CheckpointError(f"{path}: {name} holds {shown(pattern)}, which is no pattern: {cause}.") from cause
    return found


def _matched(patterns: Mapping[re.Pattern[str], Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if pattern.match(name)), otherwise)
