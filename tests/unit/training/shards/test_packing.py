"""Packing: the loss is that of the examples alone, micro-batches are full, and fillers count for nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seamount.models.config import ModelConfig
from seamount.models.network import build_network
from seamount.training.examples.example import Example
from seamount.training.shards.packing import pack


def examples_of(lengths, vocabulary=64, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for index, length in enumerate(lengths):
        flags = rng.random(length) < 0.6
        flags[0], flags[-1] = False, True
        found.append((index, Example(rng.integers(3, vocabulary, length).astype(np.int32), flags)))
    return found


def small_network():
    """A latent-attention network with experts, random, in fp32."""
    model = build_network(ModelConfig.from_dict(SMALL, where="a test")).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + float(parameter.ndim == 1)
    for buffer in model.buffers():
        buffer.zero_()
    return model


SMALL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
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
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def losses(model, micro_batches):
    """The loss of each trained token, by example and place."""
    found = {}
    for micro in micro_batches:
        hidden = model.hidden_states(micro.batch(), None)
        rows = micro.trained.nonzero().flatten()
        logits = model.logits(model.norm(hidden[rows - 1]))
        values = F.cross_entropy(logits, micro.token_ids[rows], reduction="none")
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            which = int(np.searchsorted(micro.starts, row, side="right")) - 1
            found[micro.indices[which], row - micro.starts[which]] = value
    return found


@torch.no_grad()
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_loss_of_packed_examples_is_that_of_each_alone(world_size):
    model, examples = small_network(), examples_of([5, 17, 30, 9, 2, 21, 12, 3, 26])
    alone = losses(model, [pack([one], micro_tokens=64)[0] for one in examples])
    ranks = [pack(examples, micro_tokens=64, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = losses(model, [micro for mine in ranks for micro in mine])
    assert max(len(micro.indices) for mine in ranks for micro in mine) > 1
    assert together.keys() == alone.keys()
    assert len(alone) == sum(example.trained.sum() for _, example in examples)
    for place, value in alone.items():
        assert together[place] == pytest.approx(value, abs=1e-5)


def test_micro_batches_are_as_few_and_full_as_can_be():
    packed = pack(examples_of([60, 50, 40, 30, 10, 10]), micro_tokens=100)
    assert [len(micro.token_ids) for micro in packed] == [100, 100]
    assert sorted(sorted(micro.indices) for micro in packed) in ([[0, 2], [1, 3, 4, 5]], [[0, 3, 4], [1, 2, 5]])


def test_an_example_that_is_longer_than_a_micro_batch_is_one_by_itself():
    packed = pack(examples_of([5, 50, 5]), micro_tokens=20)
    assert [micro.indices for micro in packed] == [(1,), (0, 2)]


def test_ranks_without_examples_of_their_own_compute_fillers():
    ranks = [pack(examples_of([9, 4]), micro_tokens=20, rank=rank, world_size=4) for rank in range(4)]
    assert [[(micro.indices, micro.is_filler) for micro in mine] for mine in ranks] == [
        [((0,), False)],
        [((1,), False)],
        [((1,), True)],
        [((1,), True)],
    ]
    assert not ranks[2][0].trained.any()


def test_a_rank_with_fewer_micro_batches_halves_its_own_before_it_repeats_any():
    """Two long examples need two micro-batches of one rank; the other rank's fill one, which can be halved."""
    ranks = [pack(examples_of([15, 12, 9, 5, 2, 2]), micro_tokens=21, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(mine) for mine in ranks] == [2, 2]
    assert not any(micro.is_filler for mine in ranks for micro in mine)


def test_no_examples_are_no_micro_batches():
    assert pack([], micro_tokens=10, rank=1, world_size=2) == []


@pytest.mark.parametrize("wrong", [{"micro_tokens": 0}, {"rank": 2}, {"rank": -1}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="micro_tokens"):
        pack(examples_of([3]), **{"micro_tokens": 10, "rank": 0, "world_size": 2} | wrong)
