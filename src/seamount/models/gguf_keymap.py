"""Which stretch of a GGUF file is which checkpoint tensor, under the names of `models.keymap`.

With this, a loader treats a .gguf like a folder of safetensors: `Placement.key` finds an entry, whose shape is compared
with the placement's, and `models.gguf_reading` reads it. Works from the header alone: reads no weights, loads no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from seamount.core.errors import CheckpointError

from .checkpoint import StoredTensor, shown
from .gguf import BLOCK_TYPE_OF, Gguf
from .gguf_config import ROPE_FACTORS

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_STACKED = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,3})\.([a-z0-9_]+)(?:\.(weight|bias))?")
_IGNORED = "attn_rot_embd"


class Layout(Enum):
    """How the rows of an entry lie in the file."""

    PLAIN = "as in the checkpoint"
    ROTATED = "within a head, rows (0, d/2, 1, d/2+1, ...) of the checkpoint: llama's queries and keys"
    KEY_VALUE = "keys transposed `[heads, rank, nope]` and values `[heads, v, rank]` apart"


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One checkpoint tensor.

    Attributes:
        key: name in the checkpoint, as in `Placement.key`.
        shape: in the checkpoint.
        parts: the stretches of the file that it is made from: one, or keys and values for KEY_VALUE.
        layout: how the parts become the tensor.
        row_step: rows that belong together; `gguf_reading.read_rows` begins and ends at multiples of it.
    """

    key: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    layout: Layout = Layout.PLAIN
    row_step: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return sum(part.num_bytes for part in self.parts)


def gguf_entries(file: Gguf, config: dict[str, Any]) -> dict[str, GgufEntry]:
    """Return every checkpoint tensor that the file holds, by key; layers beyond the config's are left out.

    Args:
        config: of `gguf_config.hf_config`.

    Raises:
        CheckpointError: a tensor has a name that no network here has, or sizes that do not fit its kind.
    """
    num_heads, num_layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    rotated: dict[str, int] = {}
    if config["model_type"] == "llama":  # stored for an implementation that rotates neighbours
        rotated = {"attn_q": num_heads, "attn_k": int(config["num_key_value_heads"])}
    entries: dict[str, GgufEntry] = {}

    def add(entry: GgufEntry) -> None:
        if entry.key in entries:
            raise CheckpointError(f"{file.path} holds {shown(entry.key)} in two forms.")
        entries[entry.key] = entry

    for name, stored in file.tensors.items():
        if name in _OUTER:
            add(_plain(_OUTER[name], stored))
            continue
        match = _LAYER_NAME.fullmatch(name)
        if name == ROPE_FACTORS or (match and (match[2] == _IGNORED or int(match[1]) >= num_layers)):
            continue
        if match is None:
            raise _unknown(stored)
        layer, kind, ending = f"model.layers.{match[1]}", match[2], match[3] or "weight"
        if kind == "exp_probs_b":
            add(_plain(f"{layer}.mlp.gate.e_score_correction_bias", stored))
        elif kind == "attn_k_b":
            values = file.tensors.get(name.replace("attn_k_b", "attn_v_b"))
            add(_key_value(f"{layer}.self_attn.kv_b_proj.weight", stored, values, num_heads))
        elif kind == "attn_v_b":
            if name.replace("attn_v_b", "attn_k_b") not in file.tensors:
                raise CheckpointError(f"The {stored} has no attn_k_b beside it.")
        elif kind in _STACKED:
            for entry in _experts(f"{layer}.mlp.experts", stored, _STACKED[kind], config.get("n_routed_experts")):
                add(entry)
        elif kind in rotated:
            add(_rotated(f"{layer}.{_INNER[kind]}.{ending}", stored, rotated[kind]))
        elif kind in _INNER:
            add(_plain(f"{layer}.{_INNER[kind]}.{ending}", stored))
        else:
            raise _unknown(stored)
    return entries


def _unknown(stored: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"The {stored} has a name that no supported network has a place for.",
        hint="A network that leaves weights out answers wrongly.",
    )


def _plain(key: str, stored: StoredTensor) -> GgufEntry:
    return GgufEntry(key, stored.shape, (stored,))


def _rotated(key: str, stored: StoredTensor, num_heads: int) -> GgufEntry:
    rows = stored.shape[0]
    if num_heads < 1 or rows % (2 * num_heads) or not rows:
        raise CheckpointError(f"The {stored} has {rows} rows, which do not divide into {num_heads} heads of pairs.")
    return GgufEntry(key, stored.shape, (stored,), Layout.ROTATED, rows // num_heads)


def _key_value(key: str, keys: StoredTensor, values: StoredTensor | None, num_heads: int) -> GgufEntry:
    if values is None:
        raise CheckpointError(f"The {keys} has no attn_v_b beside it.")
    fit = len(keys.shape) == len(values.shape) == 3 and keys.shape[1] == values.shape[2]
    if not fit or not keys.shape[0] == values.shape[0] == num_heads:
        raise CheckpointError(
            f"The {keys} has the shape {list(keys.shape)} and its attn_v_b {list(values.shape)}; for {num_heads} "
            "heads they must be heads, rank, key columns and heads, value columns, rank."
        )
    per_head = keys.shape[2] + values.shape[1]
    shape = (num_heads * per_head, keys.shape[1])
    return GgufEntry(key, shape, (keys, values), Layout.KEY_VALUE, max(per_head, 1))


def _experts(prefix: str, stored: StoredTensor, names: tuple[str, ...], num_experts: int | None) -> list[GgufEntry]:
    if len(stored.shape) != 3 or stored.shape[0] != num_experts or stored.shape[1] % len(names):
        raise CheckpointError(
            f"The {stored} has the shape {list(stored.shape)}; it must be {num_experts} experts, rows, columns."
        )
    count, rows, columns = stored.shape[0], stored.shape[1] // len(names), stored.shape[2]
    kind = BLOCK_TYPE_OF[stored.dtype]
    size = rows * (columns // kind.num_values * kind.num_bytes)
    parts = [(expert, name) for expert in range(count) for name in names]
    return [
        GgufEntry(
            f"{prefix}.{expert}.{name}.weight",
            (rows, columns),
            (StoredTensor(stored.name, stored.dtype, (rows, columns), stored.path, stored.offset + i * size, size),),
        )
        for i, (expert, name) in enumerate(parts)
    ]
