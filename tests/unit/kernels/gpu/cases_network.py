"""Whole networks on the Triton kernels against the reference's, eagerly and through the decode graphs' buffers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device import DEVICE, INTERPRETED

from seamount import kernels
from seamount.engine.graphs import DecodeGraphs, buckets
from seamount.kernels import gpu, reference
from seamount.models.batch import Batch, Cache, Piece
from seamount.models.config import ModelConfig
from seamount.models.network import CausalLM

BLOCK, NUM_BLOCKS = 8, 16
CONFIGS = {
    "grouped": {
        "model_type": "qwen3",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
    },
    "latent": {
        "model_type": "deepseek_v2",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
}
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [5, 8, 9], [7, 9, 3, 2, 3, 8, 4, 6]]
TABLES = [[9, 2], [4], [0, 11]]
NAMES = [name for name in gpu.__all__ if hasattr(reference, name)]


def use(implementation: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the network call this implementation's kernels."""
    for name in NAMES:
        monkeypatch.setattr(kernels, name, getattr(implementation, name), raising=False)
    if implementation is reference:
        monkeypatch.setattr(kernels, "run_experts", run_experts_and_add)


def run_experts_and_add(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    add_to: torch.Tensor,
) -> torch.Tensor:
    """As `kernels.run_experts`, in plain torch."""
    return add_to + reference.run_experts(x, weights, ids, gate_up, down)


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> CausalLM:
    config = ModelConfig.from_dict(CONFIGS[request.param])
    torch.manual_seed(4)
    network = CausalLM(config).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return network


def new_cache(model: CausalLM) -> Cache:
    """Numbers everywhere, because the reference multiplies what it must not see by zero."""
    cache = model.cache_spec.allocate(NUM_BLOCKS * BLOCK, torch.float32, DEVICE)
    for tensors in cache:
        for tensor in tensors:
            tensor.zero_()
    return cache


def decode(rows: tuple[int, ...]) -> list[Piece]:
    """The last token of some sequences; those before it lie in the cache."""
    return [(TOKENS[s][-1:], len(TOKENS[s]) - 1, TABLES[s]) for s in rows]


def prefill(model: CausalLM, cache: Cache) -> torch.Tensor:
    pieces = [(tokens[:-1], 0, table) for tokens, table in zip(TOKENS, TABLES, strict=True)]
    return model(Batch.over_cache(pieces, BLOCK, DEVICE), cache)


def stand_in(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Computes the step anew instead of replaying it."""
    out = step()
    return lambda: out.copy_(step()), out


@torch.inference_mode()
def test_prefill_and_a_mixed_step_are_the_references(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for implementation in (reference, gpu):
        use(implementation, monkeypatch)
        cache = new_cache(model)
        first = prefill(model, cache)
        pieces = [*decode((0,)), ([7, 7, 1], 7, TABLES[2])]
        results.append((first, model(Batch.over_cache(pieces, BLOCK, DEVICE), cache)))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_captured_decode_is_the_references(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    use(reference, monkeypatch)
    expected_cache = new_cache(model)
    prefill(model, expected_cache)
    expected = model(Batch.over_cache(decode((0, 1, 2)), BLOCK, DEVICE), expected_cache)
    use(gpu, monkeypatch)
    cache = new_cache(model)
    prefill(model, cache)
    graphs = DecodeGraphs(
        model,
        cache,
        block_size=BLOCK,
        max_blocks=3,
        max_num_seqs=3,
        device=DEVICE,
        capture=stand_in if INTERPRETED else None,
    )
    # The same sequences in batches of several sizes and orders, through the same buffers.
    for rows in ((1,), (2, 0), (0, 1, 2)):
        pieces = decode(rows)
        assert graphs.take(pieces)
        torch.testing.assert_close(graphs.run(pieces), expected[list(rows)], rtol=1e-4, atol=1e-4)
    for written, wanted in zip(cache, expected_cache, strict=True):
        for tensor, other in zip(written, wanted, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-4)
    assert not graphs.take(decode((0, 1, 2, 0, 1)))
    assert not graphs.take([([1, 2], 4, TABLES[0])])
    assert not graphs.take([([1], 25, [0, 1, 2, 3])])
    assert not graphs.take([])


def test_buckets() -> None:
    assert buckets(1) == (1,)
    assert buckets(3) == (1, 2, 4)
    assert buckets(30) == (1, 2, 4, 8, 16, 24, 32)
