"""Loading: the right values in the right places, in the asked-for precision, and refusals that name what is wrong."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seamount.core.errors import CheckpointError, OutOfMemoryError, UnsupportedModelError
from seamount.models import loading, memory, reading
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements
from seamount.models.loading import load_model, load_planned, plan_load, planned_bytes, resident_bytes
from seamount.models.network import CausalLM
from seamount.models.precision import Precision

CPU = torch.device("cpu")


def load(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(folder, config, dtype=dtype, device=CPU, packed=False)


def targets(model: CausalLM) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize(
    "name", ["llama-biases", "qwen2-tied", "qwen3", "v2-lite", "v2-biases", "v3-mtp", "v3-no-shared"]
)
def test_every_tensor_arrives(name: str, make_folder: Any) -> None:
    folder, config, tensors = make_folder(name)
    model = load(folder, config)
    found = targets(model)
    for place in placements(config):
        assert torch.equal(place.part_of(found[place.parameter]), tensors[place.key]), place.key
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_without_its_mtp_blocks_a_network_is_the_same_and_their_weights_are_not_read(make_folder: Any) -> None:
    folder, config, tensors = make_folder("v3-mtp")
    whole = plan_load(folder, config)
    plan = whole.without_mtp()
    told: list[tuple[int, int]] = []
    model = load_planned(plan, Precision(torch.float32), device=CPU, progress=lambda *numbers: told.append(numbers))
    assert not model.mtp
    found = targets(model)
    own = {place.key: place for place in placements(plan.config)}
    assert len(own) < len(tensors)
    for key, place in own.items():
        assert torch.equal(place.part_of(found[place.parameter]), tensors[key]), key
    assert told[-1] == (sum(tensors[key].nbytes for key in own),) * 2
    precision = Precision(torch.float32)
    assert planned_bytes(plan, precision) == resident_bytes(model) < planned_bytes(whole, precision)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_converted(
    stored: torch.dtype, wanted: torch.dtype, make_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BUFFER_BYTES", 64)  # so that every tensor takes several pieces
    folder, config, tensors = make_folder("v3", dtype=stored)
    found = targets(load(folder, config, wanted))
    for place in placements(config):
        part = place.part_of(found[place.parameter])
        keeps = place.kept_fp32 or (place.kept_fp32 is None and stored == torch.float32)
        assert part.dtype == (torch.float32 if keeps else wanted), place.key
        assert torch.equal(part, tensors[place.key].to(part.dtype)), place.key


def test_float16_refuses_what_it_cannot_hold(make_folder: Any) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = 1e5

    folder, config, _ = make_folder("llama", dtype=torch.bfloat16, change=enlarge)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight.*float16") as caught:
        load(folder, config, torch.float16)
    assert "bfloat16" in (caught.value.hint or "")


def test_progress_ends_at_all_bytes(make_folder: Any) -> None:
    folder, config, tensors = make_folder("v3")
    seen: list[tuple[int, int]] = []
    load_model(
        folder, config, dtype=torch.bfloat16, device=CPU, progress=lambda done, total: seen.append((done, total))
    )
    total = sum(t.nbytes for t in tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_stacked_experts_are_read(make_folder: Any) -> None:
    folder, config, tensors = make_folder("v3")
    before = targets(load(folder, config))
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = [[tensors.pop(f"{prefix}.{e}.{kind}_proj.weight") for e in range(4)] for kind in ("gate", "up", "down")]
        gate, up, down = (torch.stack(part) for part in parts)
        tensors |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), 1), f"{prefix}.down_proj": down}
    save_file(tensors, folder / "model.safetensors")
    after = targets(load(folder, config))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_harmless_extras_are_ignored(make_folder: Any) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(40, 16)  # tied: a copy
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["model.layers.0.mlp.nothing"] = torch.zeros(0, 3)

    folder, config, _ = make_folder("qwen2-tied", change=add)
    assert load(folder, config).lm_head is None


def test_a_copy_of_the_wrong_shape_is_refused(make_folder: Any) -> None:
    folder, config, _ = make_folder("qwen2-tied", change=lambda t: t.update({"lm_head.weight": torch.zeros(39, 16)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(folder, config)


def test_unknown_tensors_are_refused_by_name(make_folder: Any) -> None:
    extras = {f"model.layers.0.adapter{i}.weight": torch.zeros(1) for i in range(5)}
    folder, config, _ = make_folder("llama", change=lambda t: t.update(extras))
    with pytest.raises(CheckpointError, match=r"5 tensor.*adapter0\.weight.*adapter2\.weight'\.") as caught:
        load(folder, config)
    assert "adapter3" not in str(caught.value)


def test_missing_tensors_are_named_and_counted(make_folder: Any) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]

    folder, config, _ = make_folder("llama", change=drop)
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm\.weight.*\(9 missing"):
        load(folder, config)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("llama", "model.layers.0.self_attn.k_proj.weight", (16, 16)),
        ("llama", "model.embed_tokens.weight", (41, 16)),
        ("v3", "model.layers.1.mlp.experts.3.up_proj.weight", (16, 12)),
        ("v3", "model.layers.1.mlp.gate.e_score_correction_bias", (4, 1)),
    ],
)
def test_a_wrong_shape_names_tensor_and_both_shapes(
    name: str, key: str, shape: tuple[int, ...], make_folder: Any
) -> None:
    folder, config, tensors = make_folder(name)
    right = list(tensors[key].shape)
    tensors[key] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder, config)
    for words in (key, "model.safetensors", str(list(shape)), str(right)):
        assert words in str(caught.value)


def test_integer_weights_are_refused(make_folder: Any) -> None:
    key = "model.layers.0.mlp.up_proj.weight"
    folder, config, _ = make_folder("llama", change=lambda t: t.update({key: torch.zeros(24, 16, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModelError, match="stored as I8"):
        load(folder, config)


def _fp8(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    tensors[key + "_scale_inv"] = torch.full((1, 1), 0.5)


KEY = "model.layers.0.self_attn.q_proj.weight"


def test_fp8_is_multiplied_by_its_scale(make_folder: Any) -> None:
    folder, config, tensors = make_folder("llama", change=lambda t: _fp8(t, KEY))
    model = load(folder, config)
    assert torch.equal(model.layers[0].self_attn.qkv_proj.weight[:16], tensors[KEY].float() * 0.5)


def test_fp8_blocks_are_read_in_strips(make_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns that are no multiple of 128, over several strips; the scale in another file."""
    monkeypatch.setattr(reading, "_BUFFER_BYTES", 64)
    raw = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 200,
        "intermediate_size": 300,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    config = ModelConfig.from_dict(raw)
    folder, _, _ = make_folder("llama")
    tensors = {p.key: torch.randn(p.shape) for p in placements(config)}
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2) + 0.5
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({key + "_scale_inv": scale}, folder / "b.safetensors")
    ours = load(folder, config).layers[0].mlp.gate_up_proj.weight[300:]
    expected = tensors[key].float()
    for row in range(300):
        for block in range(2):
            expected[row, 128 * block : 128 * block + 128] *= scale[row // 128, block]
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("scale", "words"),
    [(None, "in no file"), (torch.ones(2, 1), r"must be F32 \[1, 1\]"), (torch.ones(1, 1, dtype=torch.int32), "I32")],
)
def test_fp8_without_a_fitting_scale_is_refused(scale: torch.Tensor | None, words: str, make_folder: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        _fp8(tensors, KEY)
        del tensors[KEY + "_scale_inv"]
        if scale is not None:
            tensors[KEY + "_scale_inv"] = scale

    folder, config, _ = make_folder("llama", change=change)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(folder, config)
    assert KEY in str(caught.value)


def test_a_scale_of_a_weight_that_is_not_fp8_is_refused(make_folder: Any) -> None:
    change = {KEY + "_scale_inv": torch.ones(1, 1)}
    folder, config, _ = make_folder("llama", change=lambda t: t.update(change))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale_inv"):
        load(folder, config)


def test_a_model_beyond_memory_is_refused_before_it_is_allocated(
    make_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, _ = make_folder("llama")
    monkeypatch.setattr(loading, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(loading, "build_network", lambda config: pytest.fail("the network was built"))
    with pytest.raises(OutOfMemoryError, match="1 kB is available"):
        load(folder, config)


def test_a_sparse_file_of_absurd_size_is_refused(make_folder: Any) -> None:
    """The header and the file's length agree, so only the memory check stands between it and the machine."""
    folder, _, _ = make_folder("llama")
    raw = {
        "model_type": "llama",
        "vocab_size": 2**22,
        "hidden_size": 2**18,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "tie_word_embeddings": True,
    }
    config = ModelConfig.from_dict(raw)
    header, end = {}, 0
    for place in placements(config):
        header[place.key] = {"dtype": "BF16", "shape": place.shape, "data_offsets": [end, end + 2 * place.num_values]}
        end += 2 * place.num_values
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OutOfMemoryError):
        load(folder, config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_a_file_that_shrinks_behind_our_back_is_reported(make_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config, _ = make_folder("llama")
    path = folder / "model.safetensors"

    def plan_then_truncate(folder: Path, config: ModelConfig) -> loading.LoadPlan:
        plan = plan_load(folder, config)
        os.truncate(path, path.stat().st_size // 2)
        return plan

    monkeypatch.setattr(loading, "plan_load", plan_then_truncate)
    with pytest.raises(CheckpointError, match="ended within tensor"):
        load(folder, config)


def test_mtp_tensors_that_the_config_does_not_declare_are_refused(make_folder: Any, raw_configs: Any) -> None:
    folder, _, _ = make_folder("v3-mtp")
    config = ModelConfig.from_dict(raw_configs["v3"])
    with pytest.raises(CheckpointError, match=r"model\.layers\.3"):
        plan_load(folder, config)


def test_copies_in_the_mtp_block_are_ignored(make_folder: Any) -> None:
    folder, config, _ = make_folder("v3-mtp")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] = torch.zeros(40, 16)
    tensors["model.layers.4.shared_head.head.weight"] = torch.zeros(40, 16)
    save_file(tensors, folder / "model.safetensors")
    assert len(load(folder, config).mtp) == 2


def test_a_tied_head_is_counted_twice_where_it_is_read_twice(make_folder: Any) -> None:
    folder, config, tensors = make_folder("qwen2-tied")
    seen: list[tuple[int, int]] = []
    load_model(folder, config, dtype=torch.float32, device=CPU, progress=lambda *both: seen.append(both))
    assert seen[-1][0] == seen[-1][1] >= sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("absent", [OSError, AttributeError])
def test_memory_is_handed_back_only_where_the_c_library_can(absent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.release_freed()

    def refuse(name: object) -> object:
        raise absent

    monkeypatch.setattr(memory.ctypes, "CDLL", refuse)
    memory.release_freed()
