"""A training run small enough for a test: a V3 network of a few thousand weights on random samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seamount.training.pretraining.data import Shard
from seamount.training.pretraining.recipe import Recipe

NUM_SAMPLES, VOCABULARY = 200, 64


def small_model() -> dict[str, Any]:
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
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Samples that count upwards from a random start: something a network can learn."""
    folder = tmp_path / "shard"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 40, NUM_SAMPLES)
    samples = [(rng.integers(0, 50) + np.arange(n)) % (VOCABULARY - 3) + 3 for n in lengths]
    np.save(folder / "tokens.npy", np.concatenate(samples).astype(np.uint16))
    np.save(folder / "trained.npy", np.concatenate([np.arange(n) >= 2 for n in lengths]))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    return Shard(folder)


def _make_recipe(run_folder: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "small",
        "run_folder": run_folder,
        "seed": 1,
        "device": "cpu",
        "compile": False,
        "model": small_model(),
        "data": {
            "tokenizer": run_folder,
            "batch_tokens": 128,
            "buckets": [16, 32],
            "stages": [{"from_step": 0, "samples": NUM_SAMPLES}],
        },
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"warmup_steps": 2, "total_steps": 12, "decay_steps": 4},
        "mtp": {"steps": 3, "learning_rate": 0.01},
        "checkpoint_every_steps": 4,
    }
    return Recipe.model_validate(fields | changes)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """`make_recipe(run_folder, **changes)`: a twelve-step run, with fields replaced."""
    return _make_recipe
