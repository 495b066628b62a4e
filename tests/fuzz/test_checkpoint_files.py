"""Whatever bytes a checkpoint folder holds, reading it ends in a correct read or in a CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from seamount.core.errors import CheckpointError
from seamount.models.checkpoint import DTYPE_BYTES, INDEX_NAME, Checkpoint, read_header
from seamount.models.config import ModelConfig
from seamount.models.footprint import num_active_parameters, num_parameters
from seamount.models.loading import plan_load

GOOD = save({"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16)})

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def check(path: Path) -> None:
    """A header that is accepted describes bytes that are really there."""
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    size = path.stat().st_size
    for stored in tensors.values():
        assert 0 <= stored.offset <= stored.offset + stored.num_bytes <= size
        assert torch.Size(stored.shape).numel() * DTYPE_BYTES[stored.dtype] == stored.num_bytes


@quick
@given(st.binary(max_size=200))
@example(b"\xff" * 8)
@example(bytes(8))
@example((2).to_bytes(8, "little") + b"{}")
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    check(path)


@quick
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(GOOD)))
def test_flipped_and_missing_bytes(tmp_path: Path, flips: list[tuple[int, int]], end: int) -> None:
    data = bytearray(GOOD)
    for position, value in flips:
        data[position] = value
    path = tmp_path / "model.safetensors"
    path.write_bytes(data[:end] if end % 2 else data)
    check(path)


tensor_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "F9"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@quick
@given(st.dictionaries(st.text(max_size=6), tensor_entries | json_values, max_size=4), st.integers(0, 40))
def test_mutated_headers(tmp_path: Path, header: dict[str, Any], num_data: int) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_data))
    check(path)


@quick
@given(
    json_values
    | st.dictionaries(
        st.just("weight_map"), st.dictionaries(st.text(max_size=6), json_values | st.just("a.safetensors"))
    )
)
def test_random_indexes(tmp_path: Path, index: Any) -> None:
    (tmp_path / "a.safetensors").write_bytes(GOOD)
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    try:
        found = Checkpoint.from_folder(tmp_path)
    except CheckpointError:
        return
    assert {path.name for path in found.files} == {"a.safetensors"}


V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "kv_lora_rank": 4,
    "q_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
    "rope_theta": 10000,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 4,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
odd_values = json_values | st.sampled_from([0, -1, 1, 3, 2**16, 2**31, 2**63, 1e308, "", "auto", [], {}])


@quick
@given(st.sampled_from([V3, LLAMA]), st.data())
def test_configs_with_odd_values(base: dict[str, Any], data: st.DataObject) -> None:
    """A config that is accepted describes a network of finite size, and one that these weights do not fit."""
    names = data.draw(st.lists(st.sampled_from(sorted(base)), min_size=1, max_size=3, unique=True))
    raw = {**base, **{name: data.draw(odd_values) for name in names if name != "model_type"}}
    try:
        config = ModelConfig.from_dict(raw)
    except CheckpointError:
        return
    assert 0 < num_active_parameters(config) <= num_parameters(config) + config.vocab_size * config.hidden_size


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_routed_experts", "vocab_size", "hidden_size"])
def test_a_config_that_lies_is_refused_before_memory_is_spent(tmp_path: Path, field: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    absurd = {"num_hidden_layers": 1024, "n_routed_experts": 2**16, "vocab_size": 2**22, "hidden_size": 2**18}
    config = ModelConfig.from_dict({**V3, **absurd, field: absurd[field]})
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        plan_load(tmp_path, config)
