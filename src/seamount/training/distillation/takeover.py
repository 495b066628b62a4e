"""What a student that is like its teacher can take over from it: `take_over`. Called by `student`.

Its layers are the teacher's, spread evenly from the first to the last; of a feed-forward network it keeps the units
that weigh most. Where it has the same hidden size, that is all. Where it is narrower, the residual stream is turned so
that its directions come in the order of their weight in embedding and head, and the last are cut off: a turn changes
nothing that a network with RMS norms computes, once the norms' scales are multiplied into the matrices behind them
(SliceGPT, arXiv 2401.15024, section 3). It must not know how a config is chosen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seamount.models.config import ModelConfig
from seamount.models.keymap import Placement, placements
from seamount.models.load_plan import plan_load
from seamount.models.loading import load_planned
from seamount.models.network import CausalLM
from seamount.models.precision import Precision

from .shrinking import teachers_layer

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Whose columns read the residual stream behind which norm, and whose rows write to it; and feed-forward networks.
_BEHIND = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    "post_attention_layernorm": ("gate_proj", "up_proj", "mlp.gate"),
}
_WRITERS = ("o_proj", "down_proj")
_INSIDE = ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def take_over(teacher: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Overwrite a student's weights by the teacher's.

    Args:
        config: the student's: of the teacher's family, heads and experts, not wider or deeper.
        tensors: by parameter name, fp32; changed in place.

    Raises:
        CheckpointError, OutOfMemoryError: see `models.loading.load_model`.
    """
    taught = ModelConfig.from_folder(teacher)
    plan = plan_load(teacher, taught).without_mtp()
    model = load_planned(plan, Precision(torch.float32), device=torch.device("cpu"))
    source = _Source(model, plan.config)
    turn = _turn(source, config.hidden_size) if config.hidden_size < taught.hidden_size else None
    for place in placements(config):
        place.part_of(tensors[place.parameter]).copy_(_tensor(source, place, config, turn))


class _Source:
    """The teacher's weights by checkpoint key, in fp32."""

    def __init__(self, model: CausalLM, config: ModelConfig) -> None:
        self.config = config
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._places = {place.key: place for place in placements(config)}

    def read(self, key: str) -> Tensor:
        place = self._places[key]
        return place.part_of(self._tensors[place.parameter].detach()).float()


@dataclass(frozen=True)
class _Turn:
    """How the residual stream is turned and cut.

    Attributes:
        basis: `[C, c]`, orthonormal columns.
        scale: of the norms behind it: a shorter vector's root mean square is larger.
    """

    basis: Tensor
    scale: float

    def read(self, matrix: Tensor, norm: Tensor) -> Tensor:
        """A matrix `[N, C]` that reads behind a norm of scale `[C]`, for the turned stream: `[N, c]`."""
        return (matrix * norm) @ self.basis


def _turn(source: _Source, width: int) -> _Turn:
    tables = [source.read(_EMBEDDING)]
    if not source.config.tie_embeddings:
        tables.append(source.read(_HEAD) * source.read(_NORM))
    weight = torch.zeros(source.config.hidden_size, source.config.hidden_size)
    for table in tables:
        gram = table.T @ table
        weight += gram / gram.trace()
    basis = torch.linalg.eigh(weight).eigenvectors.flip(1)[:, :width].contiguous()
    return _Turn(basis, (source.config.hidden_size / width) ** 0.5)


def _tensor(source: _Source, place: Placement, config: ModelConfig, turn: _Turn | None) -> Tensor:
    """What the student's tensor begins as."""
    match = _LAYER.fullmatch(place.key)
    if match is None:
        return _outer(source, place.key, turn)
    layer = teachers_layer(int(match[1]), config.num_layers, source.config.num_layers)
    prefix, name = f"model.layers.{layer}.", match[2]
    tensor, (module, _, kind) = source.read(prefix + name), name.rpartition(".")
    if module.endswith(_INSIDE):
        units = _units(source, prefix + module.rpartition(".")[0], config)
        tensor = tensor[:, units] if module.endswith("down_proj") and kind == "weight" else tensor
        tensor = tensor[units] if not module.endswith("down_proj") else tensor
    if turn is None:
        return tensor
    if module.endswith(_WRITERS):
        return turn.basis.T @ tensor
    if module in _BEHIND:
        return torch.full_like(tensor, turn.scale)[: place.shape[0]]
    norm = next((norm for norm, readers in _BEHIND.items() if module.endswith(readers)), None)
    return tensor if norm is None or kind != "weight" else turn.read(tensor, source.read(f"{prefix}{norm}.weight"))


def _outer(source: _Source, key: str, turn: _Turn | None) -> Tensor:
    tensor = source.read(key)
    if turn is None:
        return tensor
    if key == _NORM:
        # A head of its own takes the norm's scale in; one that is the embedding cannot, but for its mean.
        mean = float(tensor.mean()) if source.config.tie_embeddings else 1.0
        return torch.full((turn.basis.shape[1],), turn.scale * mean)
    return turn.read(tensor, source.read(_NORM)) if key == _HEAD else tensor @ turn.basis


def _units(source: _Source, module: str, config: ModelConfig) -> Tensor:
    """Which units of a feed-forward network stay, in their order: those whose matrices weigh most."""
    gate, up, down = (source.read(f"{module}.{name}.weight") for name in _INSIDE)
    weights = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    is_dense = module.endswith(".mlp")
    widths = [
        c.intermediate_size if is_dense or c.experts is None else c.experts.intermediate_size
        for c in (source.config, config)
    ]
    return weights.topk(round(len(weights) * widths[1] / widths[0])).indices.sort().values
