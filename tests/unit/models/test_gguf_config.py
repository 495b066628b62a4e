"""Metadata of GGUF files in Hugging Face spelling: what has defaults, what is known by other means, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.checkpoint import StoredTensor
from seamount.models.config import ModelConfig
from seamount.models.gguf import Gguf
from seamount.models.gguf_config import generation_config, hf_config

PATH = Path("model.gguf")
COMMON = {
    "context_length": 4096,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
LATENT = {
    "attention.kv_lora_rank": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 8,
    "expert_count": 256,
    "expert_used_count": 8,
    "expert_feed_forward_length": 32,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
}


def file(architecture: str, general: dict[str, Any] | None = None, **fields: Any) -> Gguf:
    """A file of no weights; fields are named with two underscores for a dot."""
    base = COMMON | (LATENT if architecture == "deepseek2" else {})
    own = base | {name.replace("__", "."): value for name, value in fields.items()}
    metadata = {f"{architecture}.{name}": value for name, value in own.items() if value is not None}
    embedding = StoredTensor("token_embd.weight", "F32", (100, 64), PATH, 0, 25600)
    return Gguf(
        PATH, {"general.architecture": architecture, **(general or {}), **metadata}, {embedding.name: embedding}
    )


def test_sampling_and_ends() -> None:
    general = {"general.sampling.temp": 0.6, "general.sampling.top_p": 0.95, "general.sampling.top_k": 20}
    ends = {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in (("eos", 7), ("eot", 9), ("eom", 7))}
    found = generation_config(file("llama", general | ends))
    assert found == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [7, 9]}
    assert generation_config(file("llama")) == {}
    assert ModelConfig.from_dict(hf_config(file("llama", ends))).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({}, (8, 4)),
        ({"expert_group_count": 4, "expert_group_used_count": 2}, (4, 2)),
        ({"expert_count": 384}, (1, 1)),
        ({"expert_count": 160, "expert_gating_func": None, "expert_weights_norm": None}, (8, 3)),
        ({"expert_count": 64, "expert_gating_func": 1, "expert_weights_norm": False}, (1, 1)),
    ],
)
def test_groups_of_experts_are_known_where_early_files_leave_them_out(
    fields: dict[str, Any], groups: tuple[int, int]
) -> None:
    config = ModelConfig.from_dict(hf_config(file("deepseek2", **fields)))
    assert config.experts is not None
    assert (config.experts.num_groups, config.experts.num_chosen_groups) == groups
    sigmoid = fields.get("expert_gating_func", 2) == 2
    assert (config.family, config.experts.router) == (
        ("deepseek_v3", "sigmoid") if sigmoid else ("deepseek_v2", "softmax")
    )


@pytest.mark.parametrize(("number", "dtype"), [(0, "float32"), (1, "float16"), (15, "bfloat16"), (32, "bfloat16")])
def test_dtype_follows_the_file_type(number: int, dtype: str) -> None:
    assert ModelConfig.from_dict(hf_config(file("qwen2", {"general.file_type": number}))).dtype == dtype


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rope__scaling__type": "longrope"}, "'longrope'"),
        ({"rope__scaling__type": "yarn", "rope__scaling__yarn_attn_factor": 1.2}, "yarn_attn_factor"),
        ({"attention__scale": 0.5}, r"attention\.scale"),
        ({"final_logit_softcapping": 30.0}, "softcapping"),
    ],
)
def test_what_is_not_run_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        hf_config(file("qwen2", **fields))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"block_count": None}, "block_count"),
        ({"block_count": "2"}, "block_count"),
        ({"block_count": -1}, "block_count"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
        ({"rope__scaling__type": "yarn"}, "original_context_length"),
    ],
)
def test_broken_fields_are_named(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        hf_config(file("qwen3", **fields))
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, "general.architecture"),
        ({"general.architecture": "mamba"}, "'mamba'"),
        ({"general.architecture": "llama"}, "token_embd"),
    ],
)
def test_a_config_needs_a_known_architecture(metadata: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        hf_config(Gguf(PATH, metadata, {}))
