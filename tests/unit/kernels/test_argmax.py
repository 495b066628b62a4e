"""The greedy choice in every instruction set, against plain torch."""

from __future__ import annotations

import pytest
import torch

from seamount import kernels

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("count", [1, 7, 63, 64, 65, 500, 1000])
def test_largest_value_and_its_first_index(count: int, each_isa: str) -> None:
    torch.manual_seed(count)
    x = torch.randn(5, count)
    x[1] = x[1].round()  # many equal ones
    x[2] = 3.0
    x[3, count // 2] = INF
    x[4] = -INF
    values, indices = kernels.argmax(x)
    assert torch.equal(values, x.max(dim=-1).values)
    assert indices.tolist() == [int((row == row.max()).nonzero()[0]) for row in x]


@pytest.mark.parametrize("place", [0, 40, 64, 99])
def test_a_number_that_is_none_is_found_wherever_it_lies(place: int, each_isa: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 100)
    x[1, place] = NAN
    x[1, 99] = NAN
    x[1, 3] = INF
    values, indices = kernels.argmax(x)
    assert values[[0, 2]].isfinite().all()
    assert values[1].isnan()
    assert int(indices[1]) == place
