"""The order of examples: fair also among few, and the same for ever."""

from collections import Counter

import numpy as np
import pytest

from seamount.core.errors import ConfigError
from seamount.training.shards.order import Order, permute


def test_the_order_never_changes():
    """A resumed run sees the data it would have seen, also under another version of this program or of numpy."""
    assert Order(10, 5, seed=1).step(0).tolist() == PINNED[0]
    assert Order(10, 5, seed=1).step(3).tolist() == PINNED[1]
    assert Order(10**12, 3, seed=7).step(10**9).tolist() == PINNED[2]


PINNED = [[0, 8, 6, 9, 4], [9, 5, 4, 1, 0], [873841161460, 661692863421, 721918545556]]


def test_few_examples_come_in_every_order_equally_often():
    """Pearson's chi-squared over the 24 orders of four, 3,000 epochs: 23 degrees of freedom, 49.7 at p = 0.001."""
    counts = Counter(tuple(permute(np.arange(4), 4, f"0 {epoch}").tolist()) for epoch in range(3_000))
    assert len(counts) == 24
    assert sum((count - 125) ** 2 / 125 for count in counts.values()) < 49.7


def test_each_example_comes_at_each_place_equally_often():
    """Chi-squared over 50 x 50 cells, 1,000 epochs: 49 * 49 degrees of freedom, about 2,620 at p = 0.001."""
    counts = np.zeros((50, 50))
    for epoch in range(1_000):
        counts[np.arange(50), permute(np.arange(50), 50, f"3 {epoch}")] += 1
    assert ((counts - 20) ** 2 / 20).sum() < 2_620


def test_neighbours_do_not_stay_together():
    order = permute(np.arange(100_000), 100_000, "0 0")
    assert np.mean(np.abs(np.diff(order)) == 1) < 1e-4
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.01


def test_another_seed_or_epoch_is_another_order():
    first = Order(1000, 1000, seed=1)
    assert (first.step(0) != first.step(1)).any()
    assert (first.step(0) != Order(1000, 1000, seed=2).step(0)).any()


def test_without_shuffling_the_examples_come_as_they_lie():
    order = Order(5, 3, seed=1, shuffle=False)
    assert [order.step(step).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert order.steps_per_epoch == pytest.approx(5 / 3)


@pytest.mark.parametrize(("num_examples", "batch_size", "said"), [(0, 1, "no examples"), (1, 0, "trains nothing")])
def test_nothing_to_train_on_is_told(num_examples, batch_size, said):
    with pytest.raises(ConfigError, match=said):
        Order(num_examples, batch_size, seed=0)
