"""The old and the new spelling of config.json describe the same network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig, Qwen2Config

from seamount.models.config import ModelConfig

YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SMALL = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 48,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        (DeepseekV3Config, YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
        (DeepseekV2Config, YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}),
        (Qwen2Config, {"rope_type": "default", "rope_theta": 1e6}),
        (LlamaConfig, LLAMA3),
    ],
)
def test_old_spelling_gives_the_same_network(
    kind: Any,
    rope: dict[str, Any],
    write_checkpoint: Any,
    load: Any,
    paged_driver: Any,
    prompts: Any,
    reference_logits: Any,
    config_editor: Any,
) -> None:
    folder, reference = write_checkpoint(kind(**SMALL, rope_parameters=rope))
    new = ModelConfig.from_folder(folder)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    config_editor(
        folder,
        rope_parameters=None,
        dtype=None,
        torch_dtype="float32",
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling | {"type": rope["rope_type"]} if scaling else None,
        auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    )
    (folder / "modeling_deepseek.py").write_text("raise SystemExit('a file of the checkpoint was run')")
    old = ModelConfig.from_folder(folder)
    assert old == new
    theirs = reference_logits(reference, prompts)
    for mine, other in zip(paged_driver(load(folder)).all_logits(prompts), theirs, strict=True):
        assert (mine - other).abs().max() < 1e-4
        assert torch.equal(mine.argmax(-1), other.argmax(-1))
