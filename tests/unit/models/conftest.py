"""Small configs of each kind of network, and folders that hold one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

DENSE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
LATENT = DENSE | {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 12,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
RAW_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": DENSE | {"model_type": "llama"},
    "llama-biases": DENSE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2-tied": DENSE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": DENSE | {"model_type": "qwen3", "head_dim": 8},
    "v2-lite": LATENT | {"model_type": "deepseek_v2", "q_lora_rank": None, "n_shared_experts": 2},
    "v2-biases": LATENT | {"model_type": "deepseek_v2", "attention_bias": True, "mlp_bias": True},
    "v3": LATENT | {"model_type": "deepseek_v3"},
    "v3-mtp": LATENT | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 2},
    "v3-no-shared": LATENT | {"model_type": "deepseek_v3", "n_shared_experts": None},
    "v3-all-dense": LATENT | {"model_type": "deepseek_v3", "first_k_dense_replace": 9},
    "v3-no-experts": LATENT | {"model_type": "deepseek_v3", "n_routed_experts": None},
}


@pytest.fixture
def raw_configs() -> dict[str, dict[str, Any]]:
    return RAW_CONFIGS


@pytest.fixture(params=RAW_CONFIGS)
def any_config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each kind of network in turn."""
    return ModelConfig.from_dict(RAW_CONFIGS[request.param])


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., tuple[Path, ModelConfig, dict[str, torch.Tensor]]]:
    """Returns a function: name of a config to its folder, its config, and the tensors that the folder holds.

    `change` may edit the tensors before they are written.
    """

    def make(
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        change: Callable[[dict[str, torch.Tensor]], object] | None = None,
    ) -> tuple[Path, ModelConfig, dict[str, torch.Tensor]]:
        config = ModelConfig.from_dict(RAW_CONFIGS[name])
        generator = torch.Generator().manual_seed(1)
        tensors = {p.key: torch.randn(p.shape, generator=generator).to(dtype) for p in placements(config)}
        if change is not None:
            change(tensors)
        (tmp_path / "config.json").write_text(json.dumps(RAW_CONFIGS[name]))
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path, config, tensors

    return make
