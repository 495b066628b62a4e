"""The sampler: distributions, filters, penalties, and independence from the batch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.sampling import SamplingParams
from seamount.engine.sampler import sample, uniform
from seamount.engine.sequence import Sequence


def make(params: SamplingParams, *, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), seed: int = 5):
    sequence = Sequence("r", 0, prompt, params, seed=seed, max_tokens=100)
    sequence.token_ids += output
    return sequence


def draw_many(row: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    sequences = [make(params, seed=seed) for seed in range(count)]
    return [s.token_id for s in sample(row.repeat(count, 1), sequences, ())]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 3), st.floats(0.05, 1), st.integers(0, 12), st.floats(0, 0.5))
def test_a_row_does_not_depend_on_its_neighbours(seed, temperature, top_p, top_k, min_p) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 17, generator=generator) * 3
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, logprobs=3)
    sequences = [make(params, seed=i) for i in range(5)]
    together = sample(logits, sequences, ())
    alone = [sample(logits[i : i + 1], sequences[i : i + 1], ())[0] for i in range(5)]
    assert together == alone


def test_frequencies_follow_the_softmax() -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    tokens = draw_many(row, SamplingParams(temperature=1.0), 8000)
    measured = torch.bincount(torch.tensor(tokens), minlength=4) / 8000
    assert torch.allclose(measured, row.softmax(-1), atol=0.02)


def test_temperature_zero_takes_the_best() -> None:
    assert set(draw_many(torch.tensor([0.0, 3.0, 2.9]), SamplingParams(temperature=0), 20)) == {1}


def test_top_k_keeps_k() -> None:
    row = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6])
    assert set(draw_many(row, SamplingParams(top_k=2), 500)) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draw_many(row, SamplingParams(top_p=0.6), 800)) == {0, 1}
    assert set(draw_many(row, SamplingParams(top_p=0.01), 100)) == {0}


def test_top_p_over_a_flat_large_vocabulary_still_reaches_the_mass() -> None:
    """More candidates are needed than the sampler first looks at."""
    tokens = draw_many(torch.zeros(6000), SamplingParams(top_p=0.9), 300)
    assert len(set(tokens)) > 200


def test_min_p_drops_what_is_far_below_the_best() -> None:
    row = torch.tensor([0.6, 0.3, 0.1]).log()
    assert set(draw_many(row, SamplingParams(min_p=0.4), 500)) == {0, 1}


def test_a_seed_repeats_and_positions_differ() -> None:
    row = torch.zeros(1, 1000)
    params = SamplingParams(temperature=1.0)
    first = sample(row, [make(params, seed=9)], ())
    assert first == sample(row, [make(params, seed=9)], ())
    later = {sample(row, [make(params, seed=9, output=(1,) * i)], ())[0].token_id for i in range(20)}
    assert len(later) > 15


def test_bias_penalties_and_ban_act_on_the_choice() -> None:
    row = torch.tensor([[3.0, 2.0, 1.0]])

    def best(params: SamplingParams, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (2,)) -> int:
        return sample(row, [make(params, output=output, prompt=prompt)], (0,))[0].token_id

    assert best(SamplingParams(temperature=0)) == 0
    assert best(SamplingParams(temperature=0, logit_bias={2: 5.0})) == 2
    assert best(SamplingParams(temperature=0, presence_penalty=1.5), output=(0,)) == 1
    assert best(SamplingParams(temperature=0, frequency_penalty=0.6), output=(0,)) == 0
    assert best(SamplingParams(temperature=0, frequency_penalty=0.6), output=(0, 0)) == 1
    assert best(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=(0,)) == 1
    assert best(SamplingParams(temperature=0, min_tokens=2), output=(1,)) == 1
    assert best(SamplingParams(temperature=0, min_tokens=1), output=(1,)) == 0
    assert row.tolist() == [[3.0, 2.0, 1.0]]


def test_penalties_spare_prompt_tokens() -> None:
    row = torch.tensor([[3.0, 2.0]])
    params = SamplingParams(temperature=0, presence_penalty=2.0)
    assert sample(row, [make(params, prompt=(0, 0))], ())[0].token_id == 0


def test_logprobs_are_of_the_raw_logits() -> None:
    row = torch.tensor([[1.0, 0.0, -1.0]])
    params = SamplingParams(temperature=0, logit_bias={2: 50.0}, logprobs=2)
    found = sample(row, [make(params)], ())[0]
    expected = row[0].log_softmax(-1)
    assert found.token_id == 2
    assert abs(found.logprob - float(expected[2])) < 1e-6
    assert [i for i, _ in found.top] == [0, 1]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 127), st.integers(0, 2**31))
def test_uniform_stays_in_range(seed: int, index: int, position: int) -> None:
    assert 0.0 <= uniform(seed, index, position) < 1.0


def test_uniform_fills_the_range_evenly() -> None:
    draws = [uniform(seed, index, position) for seed in range(20) for index in range(5) for position in range(100)]
    counts = torch.histc(torch.tensor(draws), bins=10, min=0, max=1)
    assert counts.min() > 900 and counts.max() < 1100


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    temperature=st.one_of(st.just(0.0), st.floats(1e-300, 100)),
    top_p=st.floats(1e-9, 1),
    min_p=st.floats(0, 1),
    top_k=st.integers(0, 5),
    penalty=st.floats(1e-6, 10),
    min_tokens=st.integers(0, 1),
)
def test_every_allowed_parameter_gives_a_token(logits, temperature, top_p, min_p, top_k, penalty, min_tokens) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        repetition_penalty=penalty,
        min_tokens=min_tokens,
        stop_token_ids=(0, 1, 2),
    )
    (found,) = sample(torch.tensor([logits]), [make(params)], (1,))
    assert found is not None and 0 <= found.token_id < 3


def test_a_row_that_is_not_finite_gives_nothing_and_spares_the_others() -> None:
    rows = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 2.0, 1.0], [float("inf"), 0.0, 0.0]])
    params = SamplingParams(temperature=0)
    bad, good, worse = sample(rows, [make(params)] * 3, ())
    assert bad is None and worse is None
    assert good is not None and good.token_id == 1
