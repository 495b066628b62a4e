"""Whatever an adapter's two files hold, reading them ends in an adapter or in a typed error that names the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from seamount.core.errors import CheckpointError
from seamount.models.adapter import WEIGHTS_NAME, Adapter
from seamount.models.adapter_config import CONFIG_NAME
from seamount.models.config import ModelConfig

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
    }
)
NAME = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
WEIGHTS = save({f"{NAME}A.weight": torch.ones(2, 8), f"{NAME}B.weight": torch.ones(8, 2)})
GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(
    [
        *("peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern"),
        *("bias", "use_rslora", "task_type", "base_model_name_or_path", "init_lora_weights", "layers_to_transform"),
    ]
)
patterns = st.dictionaries(st.text("ao_proj.*+?()[]{}|\\d^$1", max_size=16), st.integers(1, 4), max_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


def read(folder: Path, config: bytes, weights: bytes) -> None:
    (folder / CONFIG_NAME).write_bytes(config)
    (folder / WEIGHTS_NAME).write_bytes(weights)
    try:
        Adapter.from_folder(folder).check(CONFIG, "model")
    except CheckpointError as error:
        assert str(folder) in error.message


@settings(max_examples=150)
@given(
    changes=st.dictionaries(names, values, max_size=3), more=st.dictionaries(st.text(max_size=8), values, max_size=2)
)
def test_settings_of_any_kind(changes: dict[str, Any], more: dict[str, Any], folder: Path) -> None:
    read(folder, json.dumps(GOOD | more | changes).encode(), WEIGHTS)


@settings(max_examples=150)
@given(rank=patterns, alpha=patterns)
def test_patterns_of_any_kind(rank: dict[str, int], alpha: dict[str, int], folder: Path) -> None:
    read(folder, json.dumps(GOOD | {"rank_pattern": rank, "alpha_pattern": alpha}).encode(), WEIGHTS)


@settings(max_examples=150)
@given(place=st.integers(0, len(WEIGHTS) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(WEIGHTS)))
def test_damaged_weights(place: int, byte: int, cut: int, folder: Path) -> None:
    damaged = bytearray(WEIGHTS)
    damaged[place] = byte
    read(folder, json.dumps(GOOD).encode(), bytes(damaged if cut % 2 else damaged[:cut]))


@settings(max_examples=50)
@given(config=st.binary(max_size=40))
def test_bytes_that_are_no_settings(config: bytes, folder: Path) -> None:
    read(folder, config, WEIGHTS)
