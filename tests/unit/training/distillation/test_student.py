"""How a student begins: at random, or with what it can take over from its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import tuning_site as site
from safetensors import SafetensorError
from torch import Tensor

from seamount.core.errors import CapacityError, CheckpointError, ConfigError
from seamount.models import saving
from seamount.models.config import ModelConfig
from seamount.models.loading import load_model
from seamount.models.locate import locate_model
from seamount.models.network import CausalLM
from seamount.models.prompt import PromptEncoder
from seamount.models.saving import save_folder
from seamount.training.distillation.recipe import StudentSection
from seamount.training.distillation.shrinking import shrunk_config, teachers_layer
from seamount.training.distillation.student import make_student, num_weights, random_weights
from seamount.training.distillation.takeover import take_over
from seamount.training.shards.packing import pack

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": site.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
BIASED = DENSE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
LATENT = site.shape(num_nextn_predict_layers=0, num_hidden_layers=3)
STUDENT = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
}


def weights(raw: dict[str, Any], seed: int = 4) -> dict[str, Tensor]:
    config = ModelConfig.from_dict(raw)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty(tensor.shape).normal_(0.0, 0.2, generator=generator) + (tensor.ndim == 1)
        for name, tensor in random_weights(config, 0).items()
    }


def save(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    save_folder(folder, raw, tensors, torch.float32)
    return folder


def loaded(folder: Path) -> CausalLM:
    config = ModelConfig.from_folder(folder)
    return load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"), packed=False)


def logits(folder: Path) -> Tensor:
    model = loaded(folder)
    micro = pack([(0, site.examples().example(1))], micro_tokens=100)[0]
    return model.logits(model(micro.batch(), None))


def taken_over(tmp_path: Path, raw: dict[str, Any], tensors: dict[str, Tensor], **changes: Any) -> tuple[Path, Path]:
    """Folders of a teacher, and of a student that differs from it by `changes`, begun at random."""
    teacher, smaller = save(tmp_path / "teacher", raw, tensors), raw | changes
    config = ModelConfig.from_dict(smaller)
    begun = random_weights(config, 1)
    take_over(teacher, config, begun)
    return teacher, save(tmp_path / "student", smaller, begun)


@pytest.mark.parametrize("raw", [DENSE, BIASED, LATENT])
def test_a_student_as_large_as_the_teacher_is_the_teacher(tmp_path: Path, raw: dict[str, Any]) -> None:
    teacher, student = taken_over(tmp_path, raw, weights(raw))
    assert torch.equal(logits(teacher), logits(student))


def confined(raw: dict[str, Any], tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """The weights, but with a residual stream that stays in some directions of its space, not along the axes."""
    basis = torch.linalg.qr(torch.empty(raw["hidden_size"], width).normal_()).Q
    onto = basis @ basis.T
    for name, tensor in tensors.items():
        if name in ("embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensor @ onto
        elif "o_proj" in name or "down_proj" in name:
            tensors[name] = onto @ tensor
    return tensors | {"norm.weight": torch.full((raw["hidden_size"],), 1.3)}


@pytest.mark.parametrize("raw", [DENSE | {"tie_word_embeddings": False}, BIASED, LATENT])
def test_a_narrower_student_loses_only_what_lies_in_the_directions_it_lacks(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    torch.manual_seed(2)
    tensors = confined(raw, weights(raw), 16)
    teacher, student = taken_over(tmp_path, raw, tensors, hidden_size=16)
    wanted, found = logits(teacher), logits(student)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_feed_forward_units_that_do_nothing_go_first(tmp_path: Path) -> None:
    tensors = weights(DENSE)
    idle = torch.arange(0, 64, 2)
    for index in range(6):
        tensors[f"layers.{index}.mlp.down_proj.weight"][:, idle] = 0.0
    teacher, student = taken_over(tmp_path, DENSE, tensors, intermediate_size=32)
    torch.testing.assert_close(logits(student), logits(teacher))


def test_layers_are_spread_evenly(tmp_path: Path) -> None:
    tensors = weights(DENSE)
    for index in (1, 2, 4):  # these do nothing
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            tensors[f"layers.{index}.{name}"].zero_()
    assert [teachers_layer(index, 3, 6) for index in range(3)] == [0, 2, 5]
    assert [teachers_layer(index, 1, 6) for index in range(1)] == [0]
    tensors |= {f"layers.2.{name}": tensors[f"layers.3.{name}"] for name in _names(tensors, 3)}
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        tensors[f"layers.3.{name}"] = torch.zeros_like(tensors[f"layers.3.{name}"])
    teacher, student = taken_over(tmp_path, DENSE, tensors, num_hidden_layers=3)
    torch.testing.assert_close(logits(student), logits(teacher))


def _names(tensors: dict[str, Tensor], index: int) -> list[str]:
    prefix = f"layers.{index}."
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]


@pytest.mark.parametrize("share", [0.15, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("raw", [DENSE, LATENT, site.shape(num_hidden_layers=5, vocab_size=500)])
def test_a_share_is_kept_to_and_used(raw: dict[str, Any], share: float) -> None:
    config = ModelConfig.from_dict(raw)
    small = ModelConfig.from_dict(shrunk_config(raw, config, share))
    most = share * num_weights(config)
    assert 0.4 * most < num_weights(small) <= most
    assert small.num_mtp_layers == 0 and small.head_dim == config.head_dim


def test_the_hidden_size_is_kept_where_layers_can_give_way() -> None:
    deep = DENSE | {"num_hidden_layers": 24}
    small = shrunk_config(deep, ModelConfig.from_dict(deep), 0.3)
    assert small["hidden_size"] == 32 and small["num_hidden_layers"] < 24
    tokens = DENSE | {"vocab_size": 4000}
    assert shrunk_config(tokens, ModelConfig.from_dict(tokens), 0.3)["hidden_size"] < 32


def test_dense_layers_come_from_dense_ones() -> None:
    raw = site.shape(num_hidden_layers=12, first_k_dense_replace=3)
    small = shrunk_config(raw, ModelConfig.from_dict(raw), 0.3)
    layers = [teachers_layer(index, small["num_hidden_layers"], 12) for index in range(small["num_hidden_layers"])]
    assert small["first_k_dense_replace"] == sum(layer < 3 for layer in layers)


def test_a_share_that_nothing_fits_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has only 0.001"):
        shrunk_config(LATENT, ModelConfig.from_dict(LATENT), 0.001)


def test_a_new_student_has_its_teachers_tokens_and_is_the_same_again(small_checkpoint: Path, tmp_path: Path) -> None:
    section = StudentSection(config=STUDENT)
    first = make_student(section, small_checkpoint, tmp_path / "a", seed=3)
    second = make_student(section, small_checkpoint, tmp_path / "b", seed=3)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert PromptEncoder.from_folder(first).eos_token_ids == PromptEncoder.from_folder(small_checkpoint).eos_token_ids
    assert json.loads((first / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 257
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert make_student(section, small_checkpoint, tmp_path / "a", seed=3) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="another student"):
        make_student(section, small_checkpoint, tmp_path / "a", seed=4)


def test_a_student_that_was_half_made_is_made_again(small_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"half")
    loaded(make_student(StudentSection(config=STUDENT), small_checkpoint, tmp_path / "a", seed=3))


def test_a_full_disk_is_said_and_the_student_made_later(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, folder = StudentSection(config=STUDENT), tmp_path / "a"

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_file", full)
        with pytest.raises(CapacityError, match="No space left") as told:
            make_student(section, small_checkpoint, folder, seed=3)
    assert told.value.code == "disk_full"
    loaded(make_student(section, small_checkpoint, folder, seed=3))


def test_a_student_with_fewer_tokens_is_an_error(small_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size is 200"):
        make_student(StudentSection(config=STUDENT | {"vocab_size": 200}), small_checkpoint, tmp_path / "a", seed=0)


def test_a_config_of_no_known_model_is_an_error(small_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="student.config"):
        make_student(StudentSection(config={"model_type": "gpt9"}), small_checkpoint, tmp_path / "a", seed=0)


def test_a_quarter_of_the_embedded_model_begins_knowing_its_tokens(tmp_path: Path) -> None:
    teacher = locate_model("seamount-tiny")
    folder = make_student(StudentSection(shrink=0.25), teacher, tmp_path / "student", seed=0)
    student = ModelConfig.from_folder(folder)
    assert num_weights(student) <= num_weights(ModelConfig.from_folder(teacher)) / 4
    tables = [loaded(path).embed_tokens.weight for path in (teacher, folder)]
    near = [torch.nn.functional.normalize(table[300:600], dim=1) for table in tables]
    both = torch.stack([(table @ table.T).flatten() for table in near])
    assert torch.corrcoef(both)[0, 1] > 0.8
