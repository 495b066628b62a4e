"""A tuning run small enough for a test: the embedded model's shape in little, random examples, a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from seamount.models.config import ModelConfig
from seamount.models.network import CausalLM, build_network
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import ExampleList
from seamount.training.tuning.distributed import World
from seamount.training.tuning.recipe import TuneRecipe

VOCABULARY = 64
ALONE = World(0, 1, torch.device("cpu"))


def shape(**changes: Any) -> dict[str, Any]:
    """config.json of a V3 network of some ten thousand weights, with routed experts and an MTP block."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    } | changes


def network(dtype: torch.dtype = torch.float32, seed: int = 3, **changes: Any) -> CausalLM:
    """A network of that shape with random weights; all of them are trained."""
    config = ModelConfig.from_dict(shape(**changes), where="test")
    model = build_network(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.ones(parameter.shape)
        if parameter.ndim > 1:
            values.normal_(0.0, 0.15, generator=generator)
        parameter.data = values.to(dtype)
    for buffer in model.buffers():
        buffer.zero_()
    return model.requires_grad_(True)


def examples(count: int = 24, seed: int = 1, longest: int = 40) -> ExampleList:
    """Random examples of many lengths, the later part of each trained."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(chance.integers(4, longest + 1))
        trained = np.zeros(length, bool)
        trained[int(chance.integers(1, length - 1)) :] = True
        made.append(Example(chance.integers(0, VOCABULARY, length).astype(np.int32), trained))
    return ExampleList(made)


def recipe(folder: Path = Path("unused"), **sections: Any) -> TuneRecipe:
    """A recipe of eight steps over all weights; `sections` change it."""
    fields: dict[str, Any] = {
        "model": "test",
        "output": str(folder),
        "adapter": None,
        "data": {"max_length": 64},
        "batch": {"examples": 8, "micro_tokens": 128},
        "schedule": {"steps": 8, "warmup_share": 0.25},
        "optimizer": {"learning_rate": 3e-3},
    }
    for name, value in sections.items():
        fields[name] = {**(fields.get(name) or {}), **value} if isinstance(value, dict) else value
    return TuneRecipe.checked(fields, where="test")
