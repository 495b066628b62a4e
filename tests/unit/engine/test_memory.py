"""The memory plan: what fits, what is lowered, what is refused and with which numbers."""

from __future__ import annotations

import re

import pytest
import torch

from seamount.core.errors import ConfigError, OutOfMemoryError
from seamount.core.settings import EngineConfig
from seamount.engine.memory import plan_memory
from seamount.models.config import ModelConfig
from seamount.models.footprint import cache_bytes_per_token, workspace_bytes

DENSE = ModelConfig.from_dict(
    {
        "model_type": "qwen2",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    }
)
BF16 = torch.bfloat16
WEIGHTS = 1_000_000
WORKSPACE = workspace_bytes(
    DENSE, step_tokens=EngineConfig().max_step_tokens, num_sequences=EngineConfig().max_num_seqs
)
PER_TOKEN = cache_bytes_per_token(DENSE, BF16)


def free_for(tokens: float) -> int:
    return WEIGHTS + WORKSPACE + int(tokens * PER_TOKEN)


def test_v3_caches_576_values_per_token_and_layer() -> None:
    v3 = ModelConfig.from_dict(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "max_position_embeddings": 163840,
        }
    )
    assert cache_bytes_per_token(v3, BF16) == 61 * 576 * 2


def test_with_ample_memory_the_declared_context_is_kept_and_the_cache_stays_modest() -> None:
    plan = plan_memory(DENSE, EngineConfig(max_num_seqs=4), BF16, WEIGHTS, free_for(10**7))
    assert plan.max_model_len == 8192
    assert plan.num_blocks * plan.block_size == 8192
    assert plan.cache_bytes == plan.num_blocks * plan.block_size * PER_TOKEN


def test_an_unasked_context_is_lowered_to_what_fits() -> None:
    plan = plan_memory(DENSE, EngineConfig(), BF16, WEIGHTS, free_for(4000))
    assert 512 <= plan.max_model_len < 4000
    assert plan.declared_model_len == 8192
    assert plan.cache_bytes + plan.weight_bytes + plan.workspace_bytes <= free_for(4000)


def test_an_asked_for_context_that_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        plan_memory(DENSE, EngineConfig(max_model_len=8000), BF16, WEIGHTS, free_for(4000))
    (fits,) = re.findall(r"at most (\d+) fits", caught.value.hint or "")
    assert plan_memory(
        DENSE, EngineConfig(max_model_len=int(fits)), BF16, WEIGHTS, free_for(4000)
    ).max_model_len == int(fits)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OutOfMemoryError, match="weights need"):
        plan_memory(DENSE, EngineConfig(), BF16, WEIGHTS, WEIGHTS)


def test_a_context_beyond_the_checkpoints_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="8192"):
        plan_memory(DENSE, EngineConfig(max_model_len=9000), BF16, WEIGHTS, free_for(10**7))


def test_a_given_cache_size_is_kept_to_the_block() -> None:
    plan = plan_memory(DENSE, EngineConfig(cache_memory_bytes=PER_TOKEN * 1000), BF16, WEIGHTS, free_for(10**6))
    assert plan.num_blocks == 1000 // plan.block_size
    assert plan.max_model_len == plan.num_blocks * plan.block_size
    with pytest.raises(OutOfMemoryError, match="cache_memory_bytes"):
        plan_memory(DENSE, EngineConfig(cache_memory_bytes=PER_TOKEN * 1000), BF16, WEIGHTS, free_for(500))
