"""Batches: every sample is used, in an order that depends on recipe and step alone."""

from collections import Counter

import numpy as np
import pytest

from seamount.core.errors import ConfigError
from seamount.training.pretraining.data import StageData, TrainingData

PAD = 2


@pytest.fixture
def section(make_recipe, tmp_path):
    return make_recipe(tmp_path).data


def test_rows_hold_whole_samples_and_padding_is_never_trained(shard, section):
    data = StageData(shard, section, seed=3, pad_id=PAD)
    samples = {tuple(shard.tokens[a:b]) for a, b in zip(shard.offsets, shard.offsets[1:], strict=False)}
    for step in range(20):
        batch = data.batch(step)
        assert batch.token_ids.shape[1] in section.buckets
        assert batch.token_ids.numel() <= section.batch_tokens
        assert not (batch.trained & ~batch.real).any()
        for row, real in zip(batch.token_ids, batch.real, strict=True):
            assert tuple(row[real].tolist()) in samples
            assert (row[~real] == PAD).all()
            assert not real[real.sum() :].any()


def test_a_step_gives_the_same_batch_whatever_was_asked_before(shard, section):
    first, second = (StageData(shard, section, seed=3, pad_id=PAD) for _ in range(2))
    in_order = [first.batch(step).token_ids.tolist() for step in range(40)]
    assert [second.batch(step).token_ids.tolist() for step in reversed(range(40))] == in_order[::-1]
    assert in_order[0] != in_order[1]
    assert StageData(shard, section, seed=4, pad_id=PAD).batch(0).token_ids.tolist() != in_order[0]


def test_samples_are_used_evenly_and_too_long_ones_are_counted(shard, section):
    data = StageData(shard, section, seed=3, pad_id=PAD)
    lengths = shard.lengths()
    assert shard.num_longer_than(32) == (lengths > 32).sum() > 0
    used = Counter()
    for step in range(300):
        batch = data.batch(step)
        used.update(tuple(row[real].tolist()) for row, real in zip(batch.token_ids, batch.real, strict=True))
    assert len(used) >= len(
        {tuple(shard.tokens[a:b]) for a, b in zip(shard.offsets, shard.offsets[1:], strict=False) if b - a <= 32}
    )


def test_no_sample_that_fits_is_an_error(shard, section):
    with pytest.raises(ConfigError):
        StageData(shard, section.model_copy(update={"buckets": (2,)}), seed=3, pad_id=PAD)


def test_stages_follow_each_other(shard, make_recipe, tmp_path):
    section = make_recipe(tmp_path).data
    stages = [section.stages[0], section.stages[0].model_copy(update={"from_step": 3})]
    section = section.model_copy(update={"stages": tuple(stages)})
    asked = []
    data = TrainingData(section, 3, PAD, lambda number: asked.append(number) or shard)
    batches = [data.batch(step).token_ids.numpy() for step in range(5)]
    assert asked == [0, 1]
    assert np.array_equal(batches[3], StageData(shard, section, 4, PAD).batch(0).token_ids)
