"""A teacher's guesses on disk: the same as its own words, made in parts, refused where they are of something else."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
import tuning_site as site
from torch import Tensor

from seamount.core.errors import CapacityError, ConfigError, IntegrityError
from seamount.training.distillation import cache
from seamount.training.distillation.cache import CacheFacts, TopCache, build
from seamount.training.distillation.teacher import Teacher
from seamount.training.shards.packing import MicroBatch, pack

TOP = 4
DATA = site.examples()
FACTS = CacheFacts(teacher="t", precision="float32", data=DATA.digest, top_k=TOP, temperature=2.0)


class Counting(Teacher):
    """Counts what it reads; fails when it has read enough."""

    def __init__(self, patience: int = 1000) -> None:
        super().__init__(site.network(seed=9).requires_grad_(False), 2.0)
        self.num_read, self._patience = 0, patience

    def top(self, micro: MicroBatch, count: int) -> tuple[Tensor, Tensor]:
        if self.num_read >= self._patience:
            raise KeyboardInterrupt
        self.num_read += len(micro.indices)
        return super().top(micro, count)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_PART_ROWS", 80)


def make(folder: Path, teacher: Teacher, facts: CacheFacts = FACTS) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    build(
        folder,
        facts,
        DATA,
        lambda: teacher,
        micro_tokens=64,
        world=site.ALONE,
        progress=lambda done, total: told.append((done, total)),
    )
    return told


def micros() -> list[MicroBatch]:
    return pack([(index, DATA.example(index)) for index in (5, 0, 23, 11)], micro_tokens=100)


def compared(guide_of: TopCache, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    rows = int(micro.trained.sum())
    log_q = torch.log_softmax(torch.arange(rows * site.VOCABULARY).view(rows, -1) % 7 * 0.3, dim=-1)
    return guide_of.guide(micro).compare(log_q, slice(0, rows))


def test_what_is_read_is_what_the_teacher_says(tmp_path: Path) -> None:
    teacher = Counting()
    told = make(tmp_path, teacher)
    assert told[-1][0] == told[-1][1] == int(DATA.num_trained.sum()) and len(told) > 3
    found = TopCache(tmp_path, FACTS, DATA)
    for micro in micros():
        ids, log_p = teacher.top(micro, TOP)
        guide = found.guide(micro)
        assert guide.token_ids.tolist() == ids.tolist()
        torch.testing.assert_close(guide.log_p, log_p, atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(guide.log_p.exp().sum(-1), torch.ones(len(log_p)))


def test_a_filler_has_no_rows(tmp_path: Path) -> None:
    make(tmp_path, Counting())
    micro = micros()[0]
    filler = MicroBatch(
        micro.token_ids, micro.positions, micro.starts, torch.zeros_like(micro.trained), micro.indices, is_filler=True
    )
    assert len(TopCache(tmp_path, FACTS, DATA).guide(filler).token_ids) == 0


def test_a_stopped_build_goes_on_and_a_finished_one_reads_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Counting(patience=12))
    with pytest.raises(ConfigError, match="not finished"):
        TopCache(tmp_path, FACTS, DATA)
    second = Counting()
    make(tmp_path, second)
    assert 0 < second.num_read < len(DATA)
    last = Counting()
    make(tmp_path, last)
    assert last.num_read == 0
    make(tmp_path / "whole", Counting())
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert all((tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("name", "value"), [("teacher", "other"), ("data", "other"), ("top_k", 3), ("temperature", 1.0), ("precision", "x")]
)
def test_a_cache_of_something_else_is_refused(tmp_path: Path, name: str, value: object) -> None:
    make(tmp_path, Counting())
    other = FACTS.model_copy(update={name: value})
    with pytest.raises(ConfigError, match=f"another {name}"):
        make(tmp_path, Counting(), other)
    with pytest.raises(ConfigError, match=f"another {name}"):
        TopCache(tmp_path, other, DATA)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="no cache"):
        make(tmp_path, Counting())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["ids-00000.bin", "guesses-00000.bin", "part-00000.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    make(tmp_path, Counting())
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    found = TopCache(tmp_path, FACTS, DATA)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-3])
    with pytest.raises(IntegrityError, match=name):
        found.guide(pack([(0, DATA.example(0))], micro_tokens=100)[0])


def test_facts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    make(tmp_path, Counting())
    (tmp_path / "cache.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cache\.json"):
        make(tmp_path, Counting())


def test_a_full_disk_is_said_before_and_during_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
        with pytest.raises(CapacityError, match="is free") as told:
            make(tmp_path, Counting())
        assert told.value.code == "disk_full"

    written, whole = [], cache.write_whole

    def until_full(path: Path, content: bytes) -> None:
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        whole(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "write_whole", until_full)
        with pytest.raises(CapacityError, match="No space left"):
            make(tmp_path, Counting())
    second = Counting()
    make(tmp_path, second)
    assert 0 < second.num_read < len(DATA)


def test_ranks_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = type(site.ALONE)
    monkeypatch.setattr(world, "wait", lambda self: None)
    teachers = [Counting(), Counting()]
    for rank in (0, 1):
        build(
            tmp_path,
            FACTS,
            DATA,
            lambda rank=rank: teachers[rank],  # type: ignore[misc]
            micro_tokens=64,
            world=world(rank, 2, torch.device("cpu")),
        )
    assert all(teacher.num_read for teacher in teachers)
    assert sum(teacher.num_read for teacher in teachers) == len(DATA)
    assert compared(TopCache(tmp_path, FACTS, DATA), micros()[0])[0] > 0
