"""Rounding keeps its promise to the half step, and searched scales and clips never do worse than none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seamount.models.quantized import ChannelQuantized, GroupQuantized
from seamount.models.quantized_formats import encode_awq
from seamount.training.compression.search import (
    InputStatistics,
    Rounding,
    best_shrink,
    input_scales,
    scale_errors,
)

FOUR, EIGHT = Rounding(16), Rounding(None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights() -> dict[str, Tensor]:
    plain = torch.randn(24, 64, generator=generator())
    outliers = plain.clone()
    outliers[3] *= 50
    outliers[:, 5] *= 50
    return {
        "plain": plain,
        "outliers": outliers,
        "above zero": plain.abs() + 3,
        "below zero": -plain.abs() - 3,
        "zero": torch.zeros(24, 64),
        "below what fp16 tells apart": plain * 1e-9,
        "near the end of fp16": plain * 1e4,
        "one value per row": torch.eye(64)[:24],
    }


@pytest.mark.parametrize("what", weights())
@pytest.mark.parametrize("rounding", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_no_value_moves_by_more_than_half_a_step(what: str, rounding: Rounding) -> None:
    weight = weights()[what]
    rounded = rounding.round(weight)
    if isinstance(rounded, ChannelQuantized):
        step = rounded.scales.unsqueeze(1).expand_as(weight)
    else:
        step = rounded.scales.repeat_interleave(16, dim=1)
    assert ((rounded.dequantize() - weight).abs() <= step * 0.5001).all()


def test_what_is_rounded_to_4_bits_can_be_stored_as_it_is() -> None:
    for weight in weights().values():
        rounded = FOUR.round(weight)
        assert isinstance(rounded, GroupQuantized)
        assert torch.equal(encode_awq(rounded)["scales"].float().T, rounded.scales)


def inputs(num_tokens: int, width: int = 64, *, outliers: bool = True) -> Tensor:
    x = torch.randn(num_tokens, width, generator=generator(1))
    if outliers:
        x[:, ::13] *= 30
    return x


def statistics_of(x: Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], x.shape[0])
    for part in x.split(37):
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("num_tokens", [20, 200], ids=["as rows", "as moments"])
def test_statistics_tell_the_error_of_the_outputs(num_tokens: int) -> None:
    x, delta = inputs(num_tokens), torch.randn(24, 64, generator=generator(2))
    scales = torch.rand(64, generator=generator(3)) + 0.5
    statistics = statistics_of(x)
    statistics.rescale(scales)
    expected = (x / scales @ delta.T).square().sum()
    assert float(statistics.squared_error(delta)) == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(statistics.magnitude, (x / scales).abs().mean(0), rtol=1e-4)
    by_group = (x / scales).unflatten(1, (4, 16)).permute(1, 2, 0)
    assert torch.allclose(statistics.moments(16), by_group @ by_group.transpose(1, 2), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("num_tokens", [20, 200])
@pytest.mark.parametrize("rounding", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_salient_inputs_are_found_and_rounded_more_finely(num_tokens: int, rounding: Rounding) -> None:
    x, weight = inputs(num_tokens), weights()["plain"]
    statistics = statistics_of(x)
    candidates = input_scales(statistics.magnitude)
    errors = scale_errors(weight, statistics, candidates, rounding)
    plain = (x @ rounding.error_of(weight).T).square().sum()
    assert float(errors[0]) == pytest.approx(float(plain), rel=1e-3)
    best = candidates[int(errors.argmin())]
    scaled = rounding.round(weight * best).dequantize() / best
    assert (x @ (scaled - weight).T).square().sum() < 0.7 * plain


@pytest.mark.parametrize("rounding", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_clipping_helps_where_one_useless_weight_is_large(rounding: Rounding) -> None:
    x, weight = inputs(200, outliers=False), weights()["plain"].clone()
    weight[:, 2] = 8.0
    x[:, 2] *= 1e-3
    shrink = best_shrink(weight, statistics_of(x), rounding)
    assert shrink.min() < 0.8
    clipped, plain = rounding.error_of(weight, shrink), rounding.error_of(weight)
    assert (x @ clipped.T).square().sum() < (x @ plain.T).square().sum()


def test_clipping_leaves_alone_what_it_would_hurt() -> None:
    weight = torch.randint(-7, 9, (8, 64), generator=generator()).float()
    weight[:, ::16], weight[:, 1::16] = -7, 8  # what 4 bits hold to the digit
    assert (best_shrink(weight, statistics_of(inputs(100)), FOUR) == 1).all()
