"""The reference kernels against independent, slower formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seamount.kernels import Pages, reference

BLOCK = 4


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() < tolerance)


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last len(q) positions of one context, head by head and row by row."""
    rows, heads, _ = q.shape
    out = torch.zeros(rows, heads, v.shape[-1])
    for row in range(rows):
        seen = k.shape[0] - rows + row + 1
        for head in range(heads):
            group = head // (heads // k.shape[1])
            scores = (k[:seen, group] @ q[row, head]) * scale
            out[row, head] = scores.softmax(0) @ v[:seen, group]
    return out


# Two sequences of 11 and 6 tokens in shuffled blocks; the last 3 and 1 tokens are new.
TABLES = ((5, 0, 3), (2, 7))
PAGES = Pages.of(TABLES, (0, 3, 4), (11, 6), BLOCK)


def fill(contexts: list[torch.Tensor]) -> torch.Tensor:
    cache = torch.full((8 * BLOCK, *contexts[0].shape[1:]), 99.0)
    for context, table in zip(contexts, TABLES, strict=True):
        for i, value in enumerate(context):
            cache[table[i // BLOCK] * BLOCK + i % BLOCK] = value
    return cache


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_paged_attention(num_kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(4, 4, 8)
    keys = [torch.randn(n, num_kv_heads, 8) for n in PAGES.lengths]
    values = [torch.randn(n, num_kv_heads, 6) for n in PAGES.lengths]
    got = reference.paged_attention(q, fill(keys), fill(values), PAGES, 0.3)
    parts = (q[:3], q[3:])
    expected = torch.cat([naive_attention(p, k, v, 0.3) for p, k, v in zip(parts, keys, values, strict=True)])
    assert close(got, expected)


@pytest.mark.parametrize("rank", [5, 40])
def test_latent_attention_is_attention_over_expanded_keys_and_values(rank: int) -> None:
    """At rank 40 three new tokens are few (absorbed), at rank 5 they are many (expanded): one result."""
    torch.manual_seed(1)
    heads, nope, rope, width = 3, 8, 4, 6
    q_nope, q_rope = torch.randn(4, heads, nope), torch.randn(4, heads, rope)
    up_key, up_value = torch.randn(heads, nope, rank), torch.randn(heads, width, rank)
    contexts = [torch.randn(n, rank + rope) for n in PAGES.lengths]
    got = reference.latent_attention(q_nope, q_rope, fill(contexts), up_key, up_value, PAGES, 0.2)
    q, expected = torch.cat((q_nope, q_rope), -1), []
    for part, context in zip((q[:3], q[3:]), contexts, strict=True):
        latent, key_rope = context[:, :rank], context[:, rank:]
        k_nope = torch.einsum("lr,hdr->lhd", latent, up_key)
        k = torch.cat((k_nope, key_rope.unsqueeze(1).expand(-1, heads, -1)), -1)
        expected.append(naive_attention(part, k, torch.einsum("lr,hvr->lhv", latent, up_value), 0.2))
    assert close(got, torch.cat(expected), 1e-4)


def test_absorbed_and_expanded_latent_attention_agree() -> None:
    """The same tokens all at once (expanded: they are many) and one at a time (absorbed)."""
    torch.manual_seed(2)
    heads, nope, rope, width, rank, length = 2, 16, 4, 16, 24, 60
    # Expanding pays from rank * (nope + width) / (2 * rank - nope - width) = 48 new tokens on.
    q_nope, q_rope = torch.randn(length, heads, nope), torch.randn(length, heads, rope)
    up_key, up_value = torch.randn(heads, nope, rank) / 5, torch.randn(heads, width, rank) / 5
    cache = torch.randn(64, rank + rope)

    def run(rows: slice, end: int) -> torch.Tensor:
        pages = Pages.of([range(16)], (0, end - rows.start), (end,), BLOCK)
        return reference.latent_attention(q_nope[rows], q_rope[rows], cache, up_key, up_value, pages, 0.2)

    whole = run(slice(0, length), length)
    single = torch.cat([run(slice(i, i + 1), i + 1) for i in range(length)])
    assert close(whole, single)


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7, 1)])
def test_causal_attention_within_sequences(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    total = sum(lengths)
    q, k, v = torch.randn(total, 4, 8), torch.randn(total, 2, 8), torch.randn(total, 2, 6)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    got = reference.causal_attention(q, k, v, starts, 0.35)
    rows = [slice(a, b) for a, b in itertools.pairwise(starts)]
    assert close(got, torch.cat([naive_attention(q[r], k[r], v[r], 0.35) for r in rows]))


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    expected = torch.stack([row / math.sqrt(float(row.pow(2).mean()) + 1e-6) * weight for row in x])
    assert close(reference.rms_norm(x, weight, 1e-6), expected)
    half = reference.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6)
    assert half.dtype == torch.bfloat16 and close(half.float(), expected, 0.05)


def test_swiglu() -> None:
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    assert close(reference.swiglu(torch.cat((gate, up), -1)), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_keeps_lengths_and_depends_on_distance_only(interleaved: bool) -> None:
    torch.manual_seed(4)
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    q, k = torch.randn(1, 1, 6), torch.randn(1, 1, 6)

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        angle = (position * frequencies).unsqueeze(0)
        return reference.apply_rotary(x, angle.cos(), angle.sin(), interleaved=interleaved)

    assert close(rotated(q, 7).norm(), q.norm())
    assert close((rotated(q, 9) * rotated(k, 4)).sum(), (rotated(q, 105) * rotated(k, 100)).sum(), 1e-4)
    assert not close((rotated(q, 9) * rotated(k, 4)).sum(), (rotated(q, 9) * rotated(k, 5)).sum(), 1e-4)


def test_interleaved_pairs_are_neighbours() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # a quarter turn of the first pair
    assert reference.apply_rotary(x, cos, sin, interleaved=True).flatten().tolist() == [0, 0, 1, 0]
    assert reference.apply_rotary(x, cos, sin, interleaved=False).flatten().tolist() == [0, 0, 1, 0]
    second = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]])
    assert reference.apply_rotary(second, cos, sin, interleaved=True).flatten().tolist() == [-1, 0, 0, 0]
    assert reference.apply_rotary(second, cos, sin, interleaved=False).flatten().tolist() == [0, 1, 0, 0]


def test_write_cache_touches_its_slots_only() -> None:
    cache = torch.zeros(6, 2, dtype=torch.bfloat16)
    reference.write_cache(cache, torch.tensor([4, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert cache.tolist() == [[0, 0], [3, 4], [0, 0], [0, 0], [1, 2], [0, 0]]


def test_softmax_router_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    scores = logits.softmax(-1)[0]
    weights, ids = reference.route_softmax(logits, 2, num_groups=1, num_chosen_groups=1, scale=16.0)
    assert ids.tolist() == [[2, 3]]
    assert close(weights[0], scores[[2, 3]] * 16)


def test_softmax_router_takes_the_groups_of_the_best_experts() -> None:
    logits = torch.tensor([[5.0, -9.0, 4.0, 4.0, 1.0, 1.0]])  # groups (5,-9), (4,4), (1,1)
    _, ids = reference.route_softmax(logits, 2, num_groups=3, num_chosen_groups=1, scale=1.0)
    assert set(ids[0].tolist()) == {0, 1}


def test_sigmoid_router_bias_chooses_and_never_weighs() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    options = {"num_groups": 1, "num_chosen_groups": 1, "scale": 2.5}
    weights, ids = reference.route_sigmoid(logits, bias, 2, normalize=True, **options)
    assert set(ids[0].tolist()) == {0, 3}
    scores = logits.sigmoid()[0, ids[0]]
    assert close(weights[0], scores / scores.sum() * 2.5)
    weights, _ = reference.route_sigmoid(logits, bias, 2, normalize=False, **options)
    assert close(weights[0], scores * 2.5)


def test_sigmoid_router_ranks_groups_by_their_two_best() -> None:
    logits = torch.tensor([[5.0, -9.0, 2.0, 2.0]])  # one star, or two good ones
    _, ids = reference.route_sigmoid(
        logits, torch.zeros(4), 2, num_groups=2, num_chosen_groups=1, normalize=True, scale=1.0
    )
    assert set(ids[0].tolist()) == {2, 3}


def test_experts_give_each_token_its_own_weighted_sum() -> None:
    torch.manual_seed(5)
    x, gate_up, down = torch.randn(6, 8), torch.randn(5, 6, 8), torch.randn(5, 8, 3)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(6)])
    weights = torch.rand(6, 2)
    expected = torch.zeros(6, 8)
    for token in range(6):
        for place in range(2):
            e = int(ids[token, place])
            gate, up = (gate_up[e] @ x[token]).chunk(2)
            expected[token] += weights[token, place] * (down[e] @ (gate * gate.sigmoid() * up))
    assert close(reference.run_experts(x, weights, ids, gate_up, down), expected, 1e-4)


def test_fp8_blocks_at_the_edges() -> None:
    weight = torch.randn(130, 257).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    got = reference.dequantize_fp8_blocks(weight, scale, torch.float32)
    for row, column in ((0, 0), (127, 127), (128, 0), (129, 256), (5, 128), (5, 256), (129, 127)):
        assert got[row, column] == weight[row, column].float() * scale[row // 128, column // 128]
