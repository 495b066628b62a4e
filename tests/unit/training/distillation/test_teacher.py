"""Teacher and student must write the same tokens, and a teacher is known by its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tuning_site as site

from seamount.core.errors import ConfigError
from seamount.models.config import ModelConfig
from seamount.models.saving import save_folder
from seamount.training.distillation.student import random_weights
from seamount.training.distillation.teacher import Teacher, check_same_tokens, digest_of
from seamount.training.shards.packing import pack


def changed(folder: Path, to: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, to)
    fields = json.loads((to / name).read_text(encoding="utf-8"))
    change(fields)
    (to / name).write_text(json.dumps(fields), encoding="utf-8")
    return to


def swap(fields: dict[str, Any]) -> None:
    vocabulary = fields["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add(fields: dict[str, Any]) -> None:
    more = dict(fields["added_tokens"][0])
    fields["added_tokens"].append(more | {"id": 257, "content": "<|more|>"})


def plain(fields: dict[str, Any]) -> None:
    fields["added_tokens"][0]["content"] = "<|stop|>"


@pytest.mark.parametrize(
    ("change", "said"), [(swap, "token 64 is another"), (add, "257 and 258"), (plain, "token 256")]
)
def test_another_tokenizer_is_an_error(
    small_checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    student = changed(small_checkpoint, tmp_path / "student", "tokenizer.json", change)
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((student / name).read_text(encoding="utf-8"))
        fields.update({"vocab_size": 300} if name == "config.json" else {"eos_token": None})
        (student / name).write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        check_same_tokens(small_checkpoint, student)


def test_the_same_tokenizer_is_none_and_another_end_token_is(small_checkpoint: Path, tmp_path: Path) -> None:
    check_same_tokens(small_checkpoint, small_checkpoint)
    other = changed(
        small_checkpoint,
        tmp_path / "other",
        "generation_config.json",
        lambda fields: fields.update(eos_token_id=[256, 7]),
    )
    with pytest.raises(ConfigError, match="end an answer"):
        check_same_tokens(small_checkpoint, other)


def test_a_teacher_is_known_by_its_weights(small_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(small_checkpoint, tmp_path / "copy")
    assert digest_of(tmp_path / "copy") == digest_of(small_checkpoint)
    path = tmp_path / "copy" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert digest_of(tmp_path / "copy") != digest_of(small_checkpoint)


def test_a_teacher_runs_without_its_mtp_block_and_tells_its_likeliest_tokens(tmp_path: Path) -> None:
    raw = site.shape()
    save_folder(tmp_path, raw, random_weights(ModelConfig.from_dict(raw), 0), torch.float32)
    teacher = Teacher.load(tmp_path, temperature=2.0, device=torch.device("cpu"))
    micro = pack([(0, site.examples().example(0))], micro_tokens=100)[0]
    ids, log_p = teacher.top(micro, 5)
    assert ids.shape == (int(micro.trained.sum()), 5) and log_p.shape == (len(ids), 6)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(ids)))
    log_q = torch.log_softmax(torch.zeros(len(ids), site.VOCABULARY), dim=-1)
    divergence, slope = teacher.guide(micro).compare(log_q, slice(0, len(ids)))
    torch.testing.assert_close((1 / site.VOCABULARY - slope).gather(1, ids.long()), log_p[:, :-1].exp())
    assert divergence > 0
