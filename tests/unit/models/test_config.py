"""config.json of real checkpoints, in both spellings; and what is refused, by name of file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.config import MAX_CONFIG_BYTES, ModelConfig, RopeConfig

R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def change(raw: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**raw, **fields}


def test_r1() -> None:
    config = ModelConfig.from_dict(R1)
    assert config.quantization is not None and config.quantization.format == "fp8" and config.dtype == "bfloat16"
    assert config.num_mtp_layers == 1
    assert (config.head_dim, config.eos_token_ids) == (192, (1,))
    assert config.experts is not None and config.latent is not None
    assert (config.experts.router, config.experts.num_groups, config.experts.num_chosen_groups) == ("sigmoid", 8, 4)
    assert config.experts.normalize and config.experts.scale == 2.5
    assert config.rope == RopeConfig(
        theta=10000.0, kind="yarn", factor=40.0, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0
    )


def test_both_spellings_of_rope_agree() -> None:
    scaling = R1["rope_scaling"]
    old = ModelConfig.from_dict(R1)
    new = {k: v for k, v in R1.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": 10000.0}
    new["dtype"] = "bfloat16"
    assert ModelConfig.from_dict(new) == old
    del new["rope_parameters"]["rope_theta"]  # theta may stay at the top
    assert ModelConfig.from_dict({**new, "rope_theta": 10000}) == old


def test_families_differ_where_they_should(raw_configs: Any) -> None:
    qwen2 = ModelConfig.from_dict(raw_configs["qwen2-tied"])
    assert qwen2.qkv_bias and not qwen2.output_bias and qwen2.tie_embeddings
    qwen3 = ModelConfig.from_dict(raw_configs["qwen3"])
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 8
    llama = ModelConfig.from_dict(raw_configs["llama-biases"])
    assert llama.qkv_bias and llama.output_bias and llama.mlp_bias
    lite = ModelConfig.from_dict(raw_configs["v2-lite"])
    assert lite.latent is not None and lite.latent.q_lora_rank is None
    assert lite.experts is not None and lite.experts.router == "softmax"


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_end_tokens(value: Any, ids: tuple[int, ...]) -> None:
    assert ModelConfig.from_dict(change(R1, eos_token_id=value)).eos_token_ids == ids


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "router"),
        ({"topk_method": "greedy"}, "router"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope'"),
    ],
)
def test_what_is_not_supported_is_said(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_dict(change(R1, **fields))
    assert words in str(caught.value)


def test_sliding_windows_are_not_supported(raw_configs: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding"):
        ModelConfig.from_dict(change(raw_configs["qwen2-tied"], use_sliding_window=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 2**40),
        ("hidden_size", "7168"),
        ("hidden_size", 7168.0),
        ("hidden_size", True),
        ("vocab_size", 10**12),
        ("num_hidden_layers", 10**6),
        ("n_routed_experts", 10**9),
        ("num_experts_per_tok", 257),
        ("qk_rope_head_dim", 63),
        ("topk_group", 9),
        ("max_position_embeddings", -1),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "no"),
        ("rope_scaling", [1]),
        ("num_nextn_predict_layers", 17),
        ("rms_norm_eps", 10**400),
        ("rope_theta", 1.0),
        ("eos_token_id", ["</s>"]),
        ("kv_lora_rank", None),
    ],
)
def test_absurd_and_mistyped_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(change(R1, **{field: value}), where="/models/x/config.json")
    assert field in str(caught.value)
    assert "/models/x/config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"beta_fast": 1, "beta_slow": 32}, "beta_fast"),
        ({"original_max_position_embeddings": 6}, "original_max_position_embeddings"),
        ({"original_max_position_embeddings": 2**24, "beta_fast": 2}, "rope_theta"),
    ],
)
def test_yarn_whose_range_is_empty_or_inverted_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"rope_scaling: {named}"):
        ModelConfig.from_dict(change(R1, rope_theta=1000.0, rope_scaling=R1["rope_scaling"] | fields))


@pytest.mark.parametrize(("heads", "groups"), [(4, 3), (4, 0), (4, 5)])
def test_key_value_heads_must_divide_heads(raw_configs: Any, heads: int, groups: int) -> None:
    raw = change(raw_configs["llama"], num_attention_heads=heads, num_key_value_heads=groups)
    with pytest.raises(CheckpointError):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize("content", [b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b"{}"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_missing_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(CheckpointError, match="no config is"):
        ModelConfig.from_folder(tmp_path)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(R1))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (tmp_path / name).write_text("raise SystemExit('code of a checkpoint was run')")
    assert ModelConfig.from_folder(tmp_path).family == "deepseek_v3"
