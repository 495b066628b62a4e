"""The key map covers every parameter exactly once, in both directions, and the footprint counts along it."""

from __future__ import annotations

import torch

from seamount.models.config import ModelConfig
from seamount.models.footprint import cache_bytes_per_token, num_active_parameters, num_parameters, weight_bytes
from seamount.models.keymap import placements
from seamount.models.network import build_network
from seamount.models.precision import Precision


def test_every_value_of_the_network_comes_from_exactly_one_tensor(any_config: ModelConfig) -> None:
    model = build_network(any_config).to_empty(device="cpu")
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for value in targets.values():
        value.detach().zero_()
    keys = set()
    for place in placements(any_config):
        part = place.part_of(targets[place.parameter].detach())
        assert tuple(part.shape) == place.shape
        assert part.is_contiguous()
        part += 1
        keys.add(place.key)
    assert len(keys) == sum(1 for _ in placements(any_config))
    for name, value in targets.items():
        assert torch.equal(value, torch.ones_like(value)), name


def test_stacked_experts_are_the_same_values(raw_configs: dict) -> None:
    config = ModelConfig.from_dict(raw_configs["v3"])
    apart, stacked = list(placements(config)), list(placements(config, lambda key: True))
    assert sum(p.num_values for p in apart) == sum(p.num_values for p in stacked)
    assert "model.layers.1.mlp.experts.gate_up_proj" in {p.key for p in stacked}
    assert not any(".experts.0." in p.key for p in stacked)


def test_the_footprint_equals_the_network(any_config: ModelConfig) -> None:
    model = build_network(any_config)
    assert num_parameters(any_config) == sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * 4 for b in model.buffers())
    for dtype in (torch.bfloat16, torch.float32):
        expected = sum(p.numel() for p in model.parameters()) * dtype.itemsize + buffers
        assert weight_bytes(any_config, placements(any_config), Precision(dtype)) == expected
        assert cache_bytes_per_token(any_config, dtype) == model.cache_spec.values_per_token() * dtype.itemsize


def test_published_sizes() -> None:
    """DeepSeek-V3 and V2-Lite as their reports give them: 671B and 37B active; 15.7B and 2.4B active."""
    common = {
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
    }
    v3 = common | {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
    }
    v2_lite = common | {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
    }
    big, lite = ModelConfig.from_dict(v3), ModelConfig.from_dict(v2_lite)
    assert round(num_parameters(big) / 1e9) == 671
    assert round(num_active_parameters(big) / 1e9) == 37
    assert round(num_parameters(lite) / 1e9, 1) == 15.7
    assert round(num_active_parameters(lite) / 1e9, 1) == 2.5
    assert cache_bytes_per_token(lite, torch.bfloat16) == 27 * 576 * 2
