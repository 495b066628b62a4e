"""Checkpoints in steps: what is stored once, what stays, and that nothing damaged is ever taken for whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from seamount.core.errors import CheckpointError, ConfigError
from seamount.training.tuning.state import CheckpointStore


def state(step: int) -> dict[str, Tensor]:
    """A frozen tensor, a trained one, and one that changes at every third step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "frozen": torch.arange(24, dtype=torch.int64).reshape(4, 6),
        "trained": torch.randn(5, 3, generator=generator),
        "slow": torch.full((7,), step // 3, dtype=torch.bfloat16),
    }


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        t.dtype == right[name].dtype and t.shape == right[name].shape and torch.equal(t, right[name])
        for name, t in left.items()
    )


def fill(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, state(step), {"step": step})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_type_and_shape_comes_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.tensor([1.5, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
        "f16": torch.randn(3, 3).half(),
        "f32": torch.randn(17),
        "f64": torch.randn(2, 2, dtype=torch.float64),
        "i64": torch.tensor([2**62, -1]),
        "i32": torch.tensor([[1], [2]], dtype=torch.int32),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
    }
    path = CheckpointStore(tmp_path).save(3, tensors, {"a": [1, 0.1, None], "infinite": float("inf")})
    loaded, facts = CheckpointStore(tmp_path).load()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], tensor)]
        assert torch.equal(*as_bytes), name
    assert facts == {"a": [1, 0.1, None], "infinite": float("inf")}
    assert load_file(path / "state.safetensors")["f32"].equal(tensors["f32"])  # other tools read it too


def test_only_what_changed_is_written_and_a_full_one_comes_at_intervals(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, full_every=4, keep=100)
    fill(store, 0, 1, 2, 3, 4)
    held = {step: set(load_file(tmp_path / f"checkpoint-{step}" / "state.safetensors")) for step in store.steps()}
    everything = {"frozen", "trained", "slow"}
    assert held == {0: everything, 1: {"trained"}, 2: {"trained"}, 3: {"trained", "slow"}, 4: everything}
    for step in store.steps():
        tensors, facts = store.load(step)
        assert same(tensors, state(step))
        assert facts == {"step": step}


def test_a_checkpoint_of_which_nothing_changed_is_small_and_whole(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, state(1), {"epoch": 0})
    store.save(2, state(1), {"epoch": 1})
    tensors, facts = store.load()
    assert same(tensors, state(1))
    assert facts == {"epoch": 1}


def test_names_that_come_and_go_and_shapes_that_change(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"a": torch.zeros(4), "b": torch.zeros(2)}, {})
    store.save(2, {"a": torch.zeros(2, 2), "c": torch.zeros(4, dtype=torch.int32)}, {})
    assert same(store.load()[0], {"a": torch.zeros(2, 2), "c": torch.zeros(4, dtype=torch.int32)})


def test_old_ones_go_once_nothing_that_stays_is_built_on_them(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, full_every=4, keep=2)
    fill(store, *range(1, 4))
    assert store.steps() == [1, 2, 3]  # 2 and 3 take their frozen tensor from 1
    fill(store, 4)
    assert store.steps() == [1, 3, 4]  # what changes with every step binds nothing
    fill(store, 5, 6)  # 5 is full
    assert store.steps() == [5, 6]
    assert same(store.load(5)[0], state(5))
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-6"}


def test_a_pinned_one_stays_with_what_it_is_built_on(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, full_every=3, keep=1)
    fill(store, 1, 2)
    store.pin(2)
    fill(store, *range(3, 12))
    assert same(store.load(2)[0], state(2))
    assert {1, 2, 11} <= set(store.steps())
    assert not {4, 5, 7, 8} & set(store.steps())
    with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
        store.pin(4)


def test_a_run_that_goes_on_from_an_earlier_step_drops_what_lay_behind(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    fill(store, 1, 2, 3)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 is newer"):
        fill(store, 2)
    store.rewind(1)
    assert store.steps() == [1]
    fill(store, 2)
    assert same(store.load()[0], state(2))
    store.pin(2)
    with pytest.raises(CheckpointError, match="stay for ever"):
        store.rewind(1)
    assert store.steps() == [1, 2]


def test_the_newest_step_may_be_saved_again_with_other_facts_only(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    fill(store, 1, 2)
    store.save(2, state(2), {"finished": True})
    tensors, facts = store.load()
    assert same(tensors, state(2))
    assert facts == {"finished": True}
    with pytest.raises(CheckpointError, match="other tensors"):
        store.save(2, state(5), {})
    assert store.load()[1] == {"finished": True}
    fill(store, 3)
    assert same(store.load()[0], state(3))
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_the_tensors_given_are_neither_kept_nor_changed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    tensors = state(1)
    store.save(1, tensors, {})
    tensors["trained"].add_(1)
    assert same(store.load()[0], state(1))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.steps() == []
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        store.load()
    fill(store, 4)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5") as caught:
        store.load(5)
    assert caught.value.hint == "There are steps 4."
    with pytest.raises(ConfigError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(CheckpointError, match="complex64"):
        store.save(6, {"z": torch.zeros(1, dtype=torch.complex64)}, {})
    assert names(tmp_path / "none") == {"checkpoint-4"}


def flips(path: Path, most: int) -> list[int]:
    """Positions to damage: every byte of a small file, else spread over it."""
    size = path.stat().st_size
    return list(range(size)) if size <= most else sorted({i * (size - 1) // (most - 1) for i in range(most)})


def test_one_changed_byte_anywhere_is_found_and_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    fill(store, 1, 2, 3)
    whole_without = {1: None, 2: 3, 3: 2}  # 2 and 3 take `frozen` from 1
    for step, whole in whole_without.items():
        for path in sorted((tmp_path / f"checkpoint-{step}").iterdir()):
            data = path.read_bytes()
            for position in flips(path, 150):
                path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
                with pytest.raises(CheckpointError) as caught:
                    store.load(step)
                assert str(path) in caught.value.message, (path, position)
                if whole is None and path.name == "manifest.json":
                    assert "No checkpoint there is whole" in str(caught.value.hint)
                elif whole is not None:
                    assert f"`--resume {whole}`" in str(caught.value.hint)
            path.write_bytes(data)
    assert same(store.load()[0], state(3))


def test_what_others_are_built_on_is_proved_too(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    fill(store, 1, 2)
    held = tmp_path / "checkpoint-1" / "state.safetensors"
    data = held.read_bytes()
    for cut in (0, 5, len(data) - 1):
        held.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="checkpoint-1/state.safetensors"):
            store.load()
    held.unlink()
    with pytest.raises(CheckpointError, match="checkpoint-1/state.safetensors"):
        store.load()


def test_the_newest_is_never_passed_over_in_silence(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, full_every=1)
    fill(store, 1, 2, 3)
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-3/manifest.json") as caught:
        store.load()
    assert "`--resume 2`" in str(caught.value.hint)
    assert same(store.load(2)[0], state(2))


def test_another_history_with_good_digests_of_its_own_is_refused(tmp_path: Path) -> None:
    """A folder from another run, whole in itself, does not fit into the chain."""
    mine, other = CheckpointStore(tmp_path / "mine"), CheckpointStore(tmp_path / "other")
    fill(mine, 1, 2)
    other.save(1, state(1), {"step": "another"})
    (tmp_path / "mine" / "checkpoint-1").rename(tmp_path / "away")
    (tmp_path / "other" / "checkpoint-1").rename(tmp_path / "mine" / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"checkpoint-1/manifest.json is another one"):
        mine.load()


def test_a_save_after_damage_needs_nothing_of_the_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    fill(store, 1, 2)
    (tmp_path / "checkpoint-2" / "manifest.json").write_text("{}")
    fill(store, 3)
    (tmp_path / "checkpoint-1").rename(tmp_path / "away")
    assert same(store.load()[0], state(3))


def test_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    fill(store, 1)
    import hashlib

    path = tmp_path / "checkpoint-1" / "manifest.json"
    fields: dict[str, Any] = json.loads(path.read_text()) | {"format": 2}
    del fields["sha256"]
    digest = hashlib.sha256(json.dumps(fields, indent=1, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**fields, "sha256": digest}, indent=1, sort_keys=True))
    with pytest.raises(CheckpointError, match="format '2'"):
        store.load()
