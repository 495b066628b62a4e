"""What a step must read and compute, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seamount.core.requests import ModelFacts
from seamount.models.config import ModelConfig
from seamount.models.footprint import cache_bytes_per_token, num_active_parameters, num_parameters, weight_bytes
from seamount.models.keymap import placements
from seamount.models.precision import Precision
from seamount.ops.roofline import ModelWork

DENSE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "model_type": "deepseek_v3",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def work_of(
    raw: dict[str, Any], bytes_of_weights: int | None = None, *, is_packed: bool = False
) -> tuple[ModelWork, ModelFacts]:
    config = ModelConfig.from_dict(raw)
    facts = ModelFacts(
        name="m",
        family=config.family,
        num_parameters=num_parameters(config),
        num_active_parameters=num_active_parameters(config),
        dtype="bfloat16",
        device="cpu",
        vocab_size=config.vocab_size,
        max_model_len=64,
        num_blocks=4,
        block_size=16,
        cache_bytes_per_token=cache_bytes_per_token(config, torch.bfloat16),
        weight_bytes=bytes_of_weights or weight_bytes(config, placements(config), Precision(torch.bfloat16)),
        load_s=0.0,
    )
    return ModelWork.of(config, facts, is_packed=is_packed), facts


def test_a_dense_step_reads_every_weight_but_the_embedding_once() -> None:
    work, facts = work_of(DENSE)
    assert work.decode_bytes(8, 10) == 2 * (facts.num_parameters - 100 * 16) + 10 * facts.cache_bytes_per_token
    assert work.decode_bytes(8, 10) == work.decode_bytes(1, 10)


def test_a_tied_embedding_is_read_as_the_head() -> None:
    work, facts = work_of({**DENSE, "tie_word_embeddings": True})
    assert work.decode_bytes(1, 0) == facts.weight_bytes


def test_a_tied_embedding_beside_a_packed_head_is_looked_up_in_only() -> None:
    parameters, table = num_parameters(ModelConfig.from_dict({**DENSE, "tie_word_embeddings": True})), 100 * 16
    loaded = 1 * parameters + 2 * table  # all in 8 bits, the table once more in 16
    work, _ = work_of({**DENSE, "tie_word_embeddings": True}, loaded, is_packed=True)
    assert work.decode_bytes(1, 0) == parameters
    assert work.precision == "int8"


def test_attention_counts_a_multiply_add_per_value_of_key_and_value() -> None:
    work, facts = work_of(DENSE)
    assert work.decode_ops(3, 0) == 2 * 3 * facts.num_active_parameters
    assert work.decode_ops(3, 7) - work.decode_ops(3, 0) == 7 * 2 * (4 * 4 * (2 + 2))
    latent, _ = work_of(EXPERTS)
    assert latent.decode_ops(1, 7) - latent.decode_ops(1, 0) == 7 * 3 * 4 * (2 * (8 + 2) + 2 * 8)


def test_prefill_is_causal_and_needs_the_head_once_per_prompt() -> None:
    work, facts = work_of(EXPERTS)
    head = 2 * 100 * 16
    pair = 3 * 4 * 2 * (4 + 2 + 6)
    assert work.prefill_ops(1, 1, 0) == 2 * facts.num_active_parameters + pair
    assert work.prefill_ops(2, 3, 0) == 2 * (3 * (2 * facts.num_active_parameters - head) + head + 6 * pair)
    assert work.prefill_ops(1, 3, 2) == 2 * facts.num_active_parameters + 3 * pair


def test_a_step_needs_the_experts_that_its_tokens_choose() -> None:
    work, facts = work_of(EXPERTS)
    assert work.num_active_parameters == facts.num_active_parameters
    assert work.distinct_experts(1) == pytest.approx(2)
    assert work.distinct_experts(2) == pytest.approx(3.5)
    assert work.distinct_experts(1000) == pytest.approx(8)
    more = work.decode_bytes(2, 0) - work.decode_bytes(1, 0)
    assert more == pytest.approx(1.5 * 2 * (3 * 16 * 12) * work.weight_bytes_per_parameter)
    everything = (facts.num_parameters - 100 * 16) * work.weight_bytes_per_parameter
    assert work.decode_bytes(1000, 0) == pytest.approx(everything)


@pytest.mark.parametrize(
    ("width", "precision", "matrix"), [(2.0, "bfloat16", "bfloat16"), (1.01, "int8", "int8"), (0.53, "int4", "int8")]
)
def test_the_precision_follows_from_the_bytes_that_were_loaded(width: float, precision: str, matrix: str) -> None:
    parameters = num_parameters(ModelConfig.from_dict(DENSE))
    stored = round(2 * 1600 + width * (parameters - 1600))
    work, _ = work_of(DENSE, stored)
    assert (work.precision, work.matrix_precision) == (precision, matrix)
    assert work.weight_bytes_per_parameter == pytest.approx(width, rel=1e-3)
