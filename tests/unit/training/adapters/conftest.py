"""Small random networks with latent attention and experts, their checkpoints, and sections of recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.network import CausalLM, build_network
from seamount.models.saving import save_folder

LATENT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
}
DENSE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
RAW = {"latent": LATENT, "dense": DENSE}


@pytest.fixture
def section() -> Callable[..., Any]:
    """`section(**changes)`: the fields of a recipe's section `adapter`."""

    def make(**changes: Any) -> Any:
        targets = ("attention", "dense")
        given = {"method": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": targets, "use_rslora": False}
        return SimpleNamespace(**(given | changes))

    return make


@pytest.fixture
def network() -> Callable[..., CausalLM]:
    """`network(name, dtype)`: "latent" or "dense", with the same random weights each time."""

    def make(name: str = "latent", dtype: torch.dtype = torch.float32) -> CausalLM:
        model = build_network(ModelConfig.from_dict(RAW[name])).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            values = torch.ones(parameter.shape)
            if parameter.dim() > 1:
                values.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            parameter.data = values.to(dtype)
        for buffer in model.buffers():
            buffer.zero_()
        return model.requires_grad_(False).eval()

    return make


@pytest.fixture
def checkpoint(network: Any, tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(name, dtype)`: the folder of such a network, with a tokenizer's file that nobody reads."""

    def make(name: str = "latent", dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / "base-model"
        tensors = {**dict(network(name).named_parameters()), **dict(network(name).named_buffers())}
        save_folder(folder, RAW[name], tensors, dtype)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "README.md").write_text("of the base model")
        return folder

    return make


@pytest.fixture
def logits() -> Callable[[CausalLM], torch.Tensor]:
    """Logits of a fixed batch of two sequences, with gradients where there are any."""

    def run(model: CausalLM) -> torch.Tensor:
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))
        return model.logits(model(Batch.without_cache(tokens), None))

    return run


@pytest.fixture
def disturb() -> Callable[[CausalLM], CausalLM]:
    """Give an adapter's matrices random values, so that it changes what the network says."""

    def run(model: CausalLM) -> CausalLM:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        return model

    return run
