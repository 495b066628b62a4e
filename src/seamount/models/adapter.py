"""A LoRA adapter as PEFT writes it (adapter_config.json, adapter_model.safetensors), and what it adds to which tensor.

`models.load_plan` compares it with a checkpoint, `models.reading` adds it while weights are read (`serve --adapter`,
`seamount merge`), and `training.adapters.files` makes trainable layers of it. Names are PEFT's: those of transformers'
modules, under which a checkpoint's tensors lie. Routed experts come in both spellings: a module per expert
(`experts.3.gate_proj`), and, since transformers 5, the layer's stacked parameters (`experts.gate_up_proj`), which PEFT
files as the wrappers lie: `experts.base_layer` is the inner one. Must not know engines or training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seamount.core.errors import CheckpointError, UnsupportedModelError

from .adapter_config import AdapterConfig, scale_of
from .checkpoint import StoredTensor, open_file, read_at, read_header, shown
from .config import ModelConfig
from .keymap import Placement, placements

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
STACKED_FIRST, STACKED_SECOND = "gate_up_proj", "down_proj"
_PICKLE_NAME = "adapter_model.bin"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_STACKED = re.compile(r"(.*\.mlp\.experts)(\.base_layer)?")
_OF_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj)")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class LowRank:
    """`scale * b @ a`, to be added to a weight matrix, or to each expert's.

    Attributes:
        a: `[r, C]`, of stacked experts `[E, r, C]`.
        b: `[N, r]`, of stacked experts `[E, N, r]`.
        alpha: `scale` times the rank, or times its square root.
    """

    a: Tensor
    b: Tensor
    scale: float
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of b, rows of a."""
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is added."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of what is added to one matrix, fp32 `[stop - start, C]`."""
        return (self.b[start:stop].float() * self.scale) @ self.a.float()

    def of_expert(self, expert: int) -> LowRank:
        """The part of one of stacked experts."""
        return LowRank(self.a[expert], self.b[expert], self.scale, self.alpha)


def adaptable_modules(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The linear projections that an adapter may change, by PEFT's name, with the weight's shape.

    Routed experts are stacked: `[E, 2I, C]` and `[E, C, I]`. Not among them: embedding, routers, and
    multi-token-prediction blocks, which transformers does not know.
    """
    found = {}
    for place in placements(config, lambda key: True):
        is_matrix = len(place.shape) > 1 and not place.key.endswith(("embed_tokens.weight", ".mlp.gate.weight"))
        if is_matrix and not place.is_of_mtp:
            found[place.key.removesuffix(".weight")] = place.shape
    return found


class Adapter:
    """An adapter folder, read and checked in itself.

    Attributes:
        folder: where it lies.
        config: its settings.
        modules: what it adds, by module.
    """

    def __init__(self, folder: Path, config: AdapterConfig, modules: Mapping[str, LowRank]) -> None:
        self.folder, self.config, self.modules = folder, config, modules

    @classmethod
    def from_folder(cls, folder: Path) -> Adapter:
        """Read an adapter.

        Raises:
            CheckpointError: a file is missing or broken, or a tensor is incomplete or holds what is no finite number.
            UnsupportedModelError: it is no plain LoRA.
        """
        config = AdapterConfig.from_folder(folder)
        path = folder / WEIGHTS_NAME
        if not path.exists() and (folder / _PICKLE_NAME).exists():
            raise UnsupportedModelError(
                f"{folder} holds its tensors as pickle only ({_PICKLE_NAME}), which can run code when read.",
                hint="Load it with peft where that does no harm, and save it again as safetensors.",
            )
        stored = read_header(path)
        pairs: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in stored.items():
            match = _KEY.fullmatch(name)
            if match is None:
                raise UnsupportedModelError(f"The {tensor} is no part of a LoRA on a linear projection.")
            pairs.setdefault(match[1], {})[match[2]] = tensor
        if not pairs:
            raise CheckpointError(f"{path} holds no tensors.")
        modules = {}
        for filed, pair in pairs.items():
            for side in "AB":
                if side not in pair:
                    raise CheckpointError(
                        f"{path} lacks the tensor {shown(f'{PREFIX}{filed}.lora_{side}.weight')}, whose other half it "
                        "holds."
                    )
            name = _module_name(filed, pairs.keys(), config)
            modules[name] = _low_rank(name, pair["A"], pair["B"], config)
        return cls(folder, config, modules)

    def __str__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()})
        told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"{self.folder.name}: LoRA of rank {told} on {len(self.modules)} matrices"

    def check(self, config: ModelConfig, model_name: str) -> None:
        """Raise CheckpointError if the adapter belongs to another model than this one."""
        shapes = adaptable_modules(config)
        for name, module in self.modules.items():
            expected = shapes.get(name) or _shape_of_expert(name, shapes)
            if expected is None:
                raise CheckpointError(f"{self._filed(name)} {self._why_unknown(name, config)}.", hint=_OTHER_BASE)
            if module.shape != expected:
                raise CheckpointError(
                    f"{self._filed(name)} adapts a matrix of the shape {list(module.shape)}; the model's is "
                    f"{list(expected)}.",
                    hint=_OTHER_BASE,
                )
        singly = {match[1] for name in self.modules if (match := _OF_EXPERT.fullmatch(name))}
        for name in self._targets(shapes):
            if name not in self.modules and name.rpartition(".")[0] not in singly:
                raise CheckpointError(
                    f"{self.folder / WEIGHTS_NAME} lacks the tensors of {name}, which {self.config.path.name} names.",
                    hint="The file is incomplete, or the adapter belongs to a model with fewer layers.",
                )
        base = self.config.base
        if base is not None and _last_name(base) != _last_name(model_name):
            raise CheckpointError(
                f"The adapter {self.folder} was made for {shown(base)}, and the model is {shown(model_name)}.",
                hint="If it is the same model under another name, set base_model_name_or_path in its "
                f"{self.config.path.name} to that name, or to null.",
            )

    def touches(self, place: Placement) -> bool:
        """Whether it adds something to this tensor."""
        return any(True for _ in self._blocks(place))

    def delta(self, place: Placement) -> Tensor | None:
        """What it adds to a checkpoint tensor, fp32, of the tensor's shape; None where it adds nothing."""
        found = self.delta_rows(place, 0, place.num_values // place.shape[-1])
        return None if found is None else found.view(place.shape)

    def delta_rows(self, place: Placement, first_row: int, num_rows: int) -> Tensor | None:
        """Some rows of `delta`, of a tensor whose axes but the last are flattened: `[num_rows, C]`."""
        total = None
        for start, first, count, module in self._blocks(place):
            begin, end = max(start, first_row), min(start + count, first_row + num_rows)
            if begin < end:
                if total is None:
                    total = torch.zeros(num_rows, place.shape[-1])
                rows = module.rows(first + begin - start, first + end - start)
                total[begin - first_row : end - first_row] = rows
        return total

    def _blocks(self, place: Placement) -> Iterator[tuple[int, int, int, LowRank]]:
        """What is added to which flattened rows of a tensor: row, row of the module, number of rows, module."""
        name = place.key.removesuffix(".weight")
        if (own := self.modules.get(name)) is not None:
            if own.a.dim() == 2:
                yield 0, 0, place.shape[0], own
            else:
                for expert in range(place.shape[0]):
                    yield expert * place.shape[1], 0, place.shape[1], own.of_expert(expert)
        elif place.expert is not None and (match := _OF_EXPERT.fullmatch(name)):
            leaf = STACKED_SECOND if match[3] == "down_proj" else STACKED_FIRST
            if (stacked := self.modules.get(f"{match[1]}.{leaf}")) is not None:
                yield 0, place.start_row, place.shape[0], stacked.of_expert(place.expert)
        elif len(place.shape) == 3:
            experts, _, leaf = name.rpartition(".")
            count, rows, _ = place.shape
            halves = ("gate_proj", "up_proj") if leaf == STACKED_FIRST else ("down_proj",)
            for expert in range(count):
                for number, half in enumerate(halves):
                    if (module := self.modules.get(f"{experts}.{expert}.{half}")) is not None:
                        height = rows // len(halves)
                        yield expert * rows + number * height, 0, height, module

    def _targets(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """Modules of the model that the settings name."""
        modules = self.config.target_modules or ()
        for name, shape in shapes.items():
            is_named = len(shape) == 2 and any(name == end or name.endswith(f".{end}") for end in modules)
            if is_named or self.config.is_parameter(name if len(shape) == 3 else f"{name}.weight"):
                yield name

    def _filed(self, name: str) -> str:
        return f"{self.folder / WEIGHTS_NAME}: {shown(name)}"

    def _why_unknown(self, name: str, config: ModelConfig) -> str:
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= config.num_layers:
            return f"is of a layer that the model does not have; it has {config.num_layers}"
        return f"is no linear projection of this {config.family} model"


_OTHER_BASE = "The adapter belongs to another model than the one that was given."


def _module_name(filed: str, all_filed: object, config: AdapterConfig) -> str:
    """PEFT's name of the module or parameter whose tensors are filed under `filed`."""
    match = _STACKED.fullmatch(filed)
    if match is None:
        return filed
    first, second = f"{match[1]}.{STACKED_FIRST}", f"{match[1]}.{STACKED_SECOND}"
    if match[2]:
        return first
    if f"{filed}.base_layer" in all_filed:  # type: ignore[operator]
        return second
    found = [name for name in (first, second) if config.is_parameter(name)]
    if len(found) != 1:
        raise CheckpointError(
            f"{config.path}: target_parameters does not say which parameter of {shown(filed)} is adapted."
        )
    return found[0]


def _low_rank(name: str, a: StoredTensor, b: StoredTensor, config: AdapterConfig) -> LowRank:
    rank, alpha = config.rank_of(name), config.alpha_of(name)
    for stored in (a, b):
        if len(stored.shape) != 2 or stored.dtype not in _DTYPES or not all(stored.shape):
            raise CheckpointError(
                f"The {stored} is {stored.dtype} {list(stored.shape)}; it must be a matrix of numbers."
            )
    is_stacked = name.endswith((f".experts.{STACKED_FIRST}", f".experts.{STACKED_SECOND}"))
    count = a.shape[0] // rank if is_stacked else 1
    if not count or a.shape[0] != rank * count or b.shape[1] != rank * count:
        raise CheckpointError(
            f"The {a} is {list(a.shape)} and its other half {list(b.shape)}; {config.path.name} says that the rank is "
            f"{rank}."
        )
    first, second = _read(a), _read(b)
    if is_stacked:  # as PEFT lays them out: ranks within experts in A, experts within ranks in B
        first = first.unflatten(0, (count, rank))
        second = second.unflatten(1, (rank, count)).permute(2, 0, 1)
    return LowRank(first, second, scale_of(rank, alpha, use_rslora=config.use_rslora), alpha)


def _read(stored: StoredTensor) -> Tensor:
    values = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
    with open_file(stored.path) as file:
        read_at(file, stored.offset, values.view(-1).view(torch.uint8).numpy().data, stored)
    if not bool(values.isfinite().all()):
        raise CheckpointError(
            f"The {stored} holds values that are no finite numbers.",
            hint="The training that made it failed, or the file is damaged.",
        )
    return values


def _shape_of_expert(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of one expert's projection, from that of the layer's stack."""
    match = _OF_EXPERT.fullmatch(name)
    if match is None:
        return None
    leaf = STACKED_SECOND if match[3] == "down_proj" else STACKED_FIRST
    stack = shapes.get(f"{match[1]}.{leaf}")
    if stack is None or int(match[2]) >= stack[0] or match[2] != str(int(match[2])):
        return None
    return (stack[1] if leaf == STACKED_SECOND else stack[1] // 2, stack[2])


def _last_name(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].casefold()
