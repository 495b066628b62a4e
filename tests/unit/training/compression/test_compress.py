"""Whole folders are quantized: every family, from every source, stopped and gone on with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seamount import kernels
from seamount.core.errors import CapacityError, CheckpointError, ConfigError, OutOfMemoryError, UnsupportedModelError
from seamount.models.batch import Batch
from seamount.models.checkpoint import Checkpoint
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements
from seamount.models.loading import load_model
from seamount.models.network import CausalLM, build_network
from seamount.models.quantized import ChannelQuantized, GroupQuantized
from seamount.models.quantized_config import QuantizationConfig
from seamount.models.quantized_formats import decode_weight
from seamount.models.saving import save_folder
from seamount.training.compression import compress as compression
from seamount.training.compression.compress import Costs, Job, Report, quantize
from seamount.training.compression.files import ShardWriter
from seamount.training.compression.layer import LayerQuantizer

COMMON: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}
LATENT = COMMON | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": COMMON | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": COMMON | {"model_type": "qwen3", "head_dim": 24},
    "llama": COMMON | {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "deepseek_v2": LATENT | {"model_type": "deepseek_v2", "q_lora_rank": None, "n_shared_experts": None},
    "deepseek_v3": LATENT | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 2},
}
KEPT = ("embed_tokens", "lm_head", "norm.weight", "layernorm.weight", "mlp.gate.", "kv_b_proj", ".bias")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family."""
    return str(request.param)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A calibration file of lines of different lengths."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(chr(97 + line) * 7 + f" tells {line} " * (4 + line) for line in range(12)))
    return path


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, small_checkpoint: Path) -> Write:
    """Returns a function that writes a random checkpoint of a family, with salient channels, and names its folder."""

    def write(raw: dict[str, Any], dtype: torch.dtype = torch.float32, name: str = "model") -> Path:
        folder = tmp_path / name
        model = build_network(ModelConfig.from_dict(raw))
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            drawn = torch.randn(value.shape, generator=generator)
            tensors[name] = 1 + 0.2 * drawn if value.ndim == 1 else drawn * value.shape[-1] ** -0.5
            if name.endswith("norm.weight"):
                tensors[name][::11] *= 5
            elif value.ndim == 1:
                tensors[name] -= 1
        save_folder(folder, raw, tensors, dtype)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(small_checkpoint / file, folder)
        return folder

    return write


def job(folder: Path, texts: Path | None, **more: Any) -> Job:
    output = more.pop("output", folder.with_name("quantized"))
    given: dict[str, Any] = {"method": "awq", "bits": 4} | more
    return Job(folder=folder, output=output, calibration=texts, **given)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in Checkpoint.from_folder(folder).files for name, value in load_file(path).items()}


def decoded(folder: Path) -> dict[str, Any]:
    """What the folder means, by the names of an unquantized one; checked to hold nothing else."""
    raw = json.loads((folder / "config.json").read_text())
    quantization = QuantizationConfig.from_config(raw)
    assert quantization is not None
    config = ModelConfig.from_dict({**raw, "quantization_config": None})
    tensors = stored(folder)
    found: dict[str, Any] = {}
    for place in placements(config):
        shape: Any = place.shape
        parts = quantization.expected_parts(place.key, shape, tensors.__contains__) if len(shape) == 2 else None
        if parts is None:
            found[place.key] = tensors.pop(place.key)
            continue
        values = {role: tensors.pop(part.name) for role, part in parts.items()}
        for role, part in parts.items():
            assert tuple(values[role].shape) in part.shapes
        found[place.key] = decode_weight(quantization, place.key, shape, values)
    assert tensors == {}
    return found


def dequantized(folder: Path) -> Path:
    """An unquantized folder of the same values."""
    target = folder.with_name(folder.name + "-plain")
    target.mkdir()
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (target / "config.json").write_text(json.dumps(raw))
    values = {name: v if isinstance(v, Tensor) else v.dequantize() for name, v in decoded(folder).items()}
    save_file({name: value.contiguous() for name, value in values.items()}, target / "model.safetensors")
    return target


def load(folder: Path) -> CausalLM:
    config = ModelConfig.from_folder(folder)
    return load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"), packed=False)


def outputs(folder: Path) -> Tensor:
    """Hidden states of some random tokens, MTP blocks' behind the model's."""
    model = load(folder)
    ids = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))
    batch = Batch.without_cache(ids)
    with torch.inference_mode():
        hidden = model(batch, None)
        if len(model.mtp):
            return torch.cat((hidden, model.mtp_hidden(hidden, ids.flatten().roll(-1), batch)))
        return hidden


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("bits", "most"), [(8, 0.2), (4, 0.7)])
def test_every_family_still_computes_nearly_the_same(
    write: Write, family: str, texts: Path, bits: int, most: float
) -> None:
    folder = write(FAMILIES[family])
    exact = outputs(folder)
    for method in ("awq", "rtn"):
        report = quantize(job(folder, texts, bits=bits, method=method, output=folder.with_name(method)))
        assert difference(outputs(dequantized(folder.with_name(method))), exact) < most
        assert all(error is not None and 0 < error < most for error in report.relative_errors)
        assert report.bits_per_weight < 32


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_nearest_needs_no_text_and_moves_nothing_by_more_than_half_a_step(
    write: Write, family: str, bits: int
) -> None:
    folder = write(FAMILIES[family], torch.bfloat16)
    report = quantize(job(folder, None, method="rtn", bits=bits))
    before = stored(folder)
    for name, value in decoded(folder.with_name("quantized")).items():
        if isinstance(value, Tensor):
            assert any(part in name for part in KEPT)
            assert torch.equal(value, before[name])
            assert value.dtype == before[name].dtype
            continue
        assert not any(part in name for part in KEPT)
        assert isinstance(value, GroupQuantized if bits == 4 else ChannelQuantized)
        if isinstance(value, GroupQuantized):
            step = value.scales.repeat_interleave(value.group_size, dim=1)
        else:
            step = value.scales.unsqueeze(1)
        assert ((value.dequantize() - before[name].float()).abs() <= 0.5001 * step).all()
    assert set(report.relative_errors) == {None}


def test_awq_rounds_what_was_scaled_and_the_norms_took_it_over_to_the_digit(
    write: Write, family: str, texts: Path
) -> None:
    """The query projection behind the first norm is never clipped, so that scale and half step can be seen in it."""
    folder = write(FAMILIES[family], torch.bfloat16)
    quantize(job(folder, texts))
    before, after = stored(folder), decoded(folder.with_name("quantized"))
    layer = "model.layers.1."
    name = next(
        name for name in (f"{layer}self_attn.q_a_proj.weight", f"{layer}self_attn.q_proj.weight") if name in after
    )
    norm = f"{layer}input_layernorm.weight"
    scales = before[norm].float() / after[norm].float()
    assert scales.max() / scales.min() > 1.2
    value = after[name]
    error = (value.dequantize() - before[name].float() * scales).abs()
    assert (error <= 0.5001 * value.scales.repeat_interleave(value.group_size, dim=1)).all()


def test_scaling_alone_changes_no_layer(
    write: Write, family: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights kept as they were scaled, experts included, each layer's output stays what it was."""
    monkeypatch.setattr(LayerQuantizer, "_round", lambda self: None)
    scaled: list[int] = []

    def keep(self: Any, place: Any, weight: Tensor, statistics: Any) -> None:
        scaled.append(place.num_values)
        for entry in self.form.entries(place.key, place.shape):
            self.writer._left.discard(entry.name)

    monkeypatch.setattr("seamount.training.compression.rounder.Rounder.round", keep)
    end = ShardWriter.__exit__
    monkeypatch.setattr(ShardWriter, "__exit__", lambda self, *_: (self._left.clear(), end(self, None, None, None))[1])
    folder = write(FAMILIES[family])
    report = quantize_without_finishing(job(folder, texts), monkeypatch)
    assert all(error < 2e-5 for error in report)


class Stopped(BaseException):
    """Stands for Ctrl-C at some point."""


def quantize_without_finishing(what: Job, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []

    def finish(self: Any, work: Any) -> None:
        found.extend(mark.relative_error for mark in work.marks())
        raise Stopped

    monkeypatch.setattr(compression._Run, "_write_outer", finish)
    with pytest.raises(Stopped):
        quantize(what)
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_searched_scales_beat_none(write: Write, family: str, texts: Path, bits: int) -> None:
    """At 8 bits in layers without a router: a few borderline tokens sent elsewhere outweigh all rounding there."""
    folder = write(FAMILIES[family])
    compared = slice(1) if bits == 8 and "n_routed_experts" in FAMILIES[family] else slice(None)
    errors = {}
    for method in ("awq", "rtn"):
        made = quantize(job(folder, texts, bits=bits, method=method, output=folder.with_name(method)))
        errors[method] = sum(error or 0 for error in made.relative_errors[compared])
    assert errors["awq"] <= errors["rtn"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2"])
def test_a_stopped_job_goes_on_and_ends_in_the_same_bytes(write: Write, name: str, texts: Path) -> None:
    folder = write(FAMILIES[name])
    quantize(job(folder, texts, output=folder.with_name("whole")))
    output = folder.with_name("quantized")
    num_layers = 4 if name == "deepseek_v3" else 2
    begun: list[int] = []
    for stop_at in range(num_layers):

        def stop(layer: int, num_layers: int, share: float, stop_at: int = stop_at) -> None:
            begun.append(layer)
            if layer == stop_at and share > 0.01 + stop_at / num_layers * 0.5:
                raise Stopped

        with pytest.raises(Stopped):
            quantize(job(folder, texts), progress=stop)
        assert not output.exists()
    told: list[Costs] = []
    quantize(job(folder, texts), on_start=told.append)
    assert told[0].num_done == num_layers - 1
    assert begun == sorted(begun)
    assert contents(output) == contents(folder.with_name("whole"))
    assert not output.with_name("quantized.partial").exists()


@pytest.mark.parametrize("step", ["describe", "rmtree", "replace"])
def test_a_job_that_was_stopped_at_its_end_ends(
    write: Write, texts: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = write(FAMILIES["qwen2"])
    quantize(job(folder, texts, output=folder.with_name("whole")))

    def stop(*_: object) -> None:
        raise Stopped

    from seamount.training.compression import work as compression_work

    with monkeypatch.context() as patch:
        if step == "describe":
            patch.setattr(compression_work.WorkFolder, "describe", stop)
        elif step == "rmtree":
            patch.setattr(compression_work.shutil, "rmtree", stop)
        else:
            rename = compression_work.os.replace
            patch.setattr(
                compression_work.os, "replace", lambda a, b: stop() if Path(b).name == "quantized" else rename(a, b)
            )
        with pytest.raises(Stopped):
            quantize(job(folder, texts))
    quantize(job(folder, texts))
    assert contents(folder.with_name("quantized")) == contents(folder.with_name("whole"))


def test_another_job_does_not_go_on_with_what_was_begun(write: Write, texts: Path) -> None:
    folder = write(FAMILIES["qwen2"])

    def stop(layer: int, num_layers: int, share: float) -> None:
        if layer:
            raise Stopped

    with pytest.raises(Stopped):
        quantize(job(folder, texts), progress=stop)
    for other in (job(folder, texts, bits=8), job(folder, texts, num_samples=5), job(folder, texts, group_size=8)):
        with pytest.raises(ConfigError, match="other arguments"):
            quantize(other)
    texts.write_text(texts.read_text() + "more")
    with pytest.raises(ConfigError, match="other arguments"):
        quantize(job(folder, texts))


def test_what_stands_at_the_output_is_left_alone(write: Write, texts: Path) -> None:
    folder = write(FAMILIES["qwen2"])
    taken = folder.with_name("taken")
    taken.mkdir()
    (taken / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        quantize(job(folder, texts, output=taken))
    with pytest.raises(ConfigError, match="inside the checkpoint"):
        quantize(job(folder, texts, output=folder / "quantized"))
    with pytest.raises(CapacityError, match="Not a directory") as refused:
        quantize(job(folder, texts, output=taken / "mine" / "quantized"))
    assert "Nothing was begun" in (refused.value.hint or "")
    taken.rename(folder.with_name("quantized.partial"))
    with pytest.raises(ConfigError, match="no unfinished quantization"):
        quantize(job(folder, texts))
    assert (folder.with_name("quantized.partial") / "mine").read_text() == "x"


def test_the_folder_holds_what_a_user_needs(write: Write, texts: Path) -> None:
    folder = write(FAMILIES["deepseek_v3"], torch.bfloat16)
    for name in ("LICENSE", "chat_template.jinja", "README.md", "pytorch_model.bin"):
        (folder / name).write_text(name)
    report = quantize(job(folder, texts))
    output = folder.with_name("quantized")
    names = {path.name for path in output.iterdir() if path.suffix != ".safetensors"}
    copied = {"LICENSE", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names == copied | {"config.json", "model.safetensors.index.json", "quantization_report.json"}
    assert (output / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    raw = json.loads((output / "config.json").read_text())
    assert raw["model_type"] == "deepseek_v3"
    quantization = raw["quantization_config"]
    assert quantization["quant_method"] == "awq"
    assert quantization["group_size"] == report.group_size == 16
    kept = set(quantization["modules_to_not_convert"])
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.kv_b_proj"} <= kept
    tensors = stored(output)
    for name in kept:
        assert f"{name}.qweight" not in tensors
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert tensors["model.layers.0.self_attn.kv_b_proj.weight"].dtype == torch.bfloat16
    assert report.bytes_after == sum(value.nbytes for value in tensors.values())
    assert json.loads((output / "quantization_report.json").read_text())["relative_errors"] == report.relative_errors


def test_experts_that_saw_no_token_are_rounded_to_nearest_and_counted(write: Write, texts: Path) -> None:
    folder = write(FAMILIES["deepseek_v3"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2] = -100
    save_file(tensors, folder / "model.safetensors")
    exact = outputs(folder)
    assert quantize(job(folder, texts)).num_plain_experts == 1
    assert difference(outputs(dequantized(folder.with_name("quantized"))), exact) < 0.7


def test_stacked_experts_give_the_same_as_single_ones(write: Write, texts: Path) -> None:
    folder = write(FAMILIES["deepseek_v3"])
    quantize(job(folder, texts, output=folder.with_name("single")))
    tensors = load_file(folder / "model.safetensors")
    for layer in (1, 2, 3):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {n: [tensors.pop(f"{stem}.{e}.{n}_proj.weight") for e in range(4)] for n in ("gate", "up", "down")}
        joined = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        tensors[f"{stem}.gate_up_proj"], tensors[f"{stem}.down_proj"] = torch.stack(joined), torch.stack(parts["down"])
    save_file(tensors, folder / "model.safetensors")
    quantize(job(folder, texts))
    left, right = stored(folder.with_name("single")), stored(folder.with_name("quantized"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("bits", [4, 8])
def test_fp8_blocks_are_a_source_too(write: Write, texts: Path, bits: int) -> None:
    folder = write(FAMILIES["deepseek_v3"] | {"hidden_size": 144, "moe_intermediate_size": 160}, torch.bfloat16)
    tensors, stores = load_file(folder / "model.safetensors"), {}
    for name, value in tensors.items():
        if value.ndim == 1 or any(part in name for part in ("embed", "lm_head", "gate.weight")):
            stores[name] = value
            continue
        scale = torch.full((-(-value.shape[0] // 128), -(-value.shape[1] // 128)), float(value.abs().max()) / 448)
        stores[name], stores[name + "_scale_inv"] = (value / scale[0, 0]).to(torch.float8_e4m3fn), scale
        wide = kernels.dequantize_fp8_blocks(stores[name], scale, torch.float32)
        tensors[name] = wide.bfloat16() if "kv_b_proj" in name else wide
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(stores, folder / "model.safetensors")
    quantize(job(folder, None, method="rtn", bits=bits))
    for name, value in decoded(folder.with_name("quantized")).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, tensors[name])
        else:
            most = float(value.scales.max())
            assert (value.dequantize() - tensors[name].float()).abs().max() <= 0.5001 * most


def test_group_sizes_are_chosen_or_refused(write: Write, texts: Path) -> None:
    folder = write(FAMILIES["qwen2"])
    told: list[Costs] = []
    quantize(job(folder, None, method="rtn"), on_start=told.append)
    assert told[0].group_size == 32
    with pytest.raises(ConfigError, match="Groups of 64 do not divide") as refused:
        quantize(job(folder, texts, group_size=64, output=folder.with_name("other")))
    assert refused.value.hint == "Possible: 32, 16, 8."
    with pytest.raises(ConfigError, match="one scale per row"):
        quantize(job(folder, texts, bits=8, group_size=32, output=folder.with_name("other")))
    odd = write(FAMILIES["qwen2"] | {"intermediate_size": 100}, name="odd")
    with pytest.raises(UnsupportedModelError, match="do not divide"):
        quantize(job(odd, texts, output=folder.with_name("other")))


def test_what_cannot_work_is_refused_before_it_starts(
    write: Write, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(FAMILIES["qwen2"])
    with pytest.raises(ConfigError, match="no calibration file"):
        quantize(job(folder, None))
    with monkeypatch.context() as patch:
        patch.setattr(compression, "available_bytes", lambda device: 2**20)
        with pytest.raises(OutOfMemoryError, match="[GMk]B of memory"):
            quantize(job(folder, texts))
    usage = dataclasses.make_dataclass("Usage", ["free"])
    with monkeypatch.context() as patch:
        patch.setattr(compression.shutil, "disk_usage", lambda path: usage(1000))
        with pytest.raises(CapacityError, match="[GMk]B of disk"):
            quantize(job(folder, texts))
    assert not folder.with_name("quantized.partial").exists()
    quantize(job(folder, texts))
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        quantize(job(folder.with_name("quantized"), texts, output=folder.with_name("twice")))


def test_weights_that_are_no_numbers_are_told_by_name(write: Write, texts: Path) -> None:
    folder = write(FAMILIES["qwen2"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        quantize(job(folder, texts))


def test_a_report_counts_bits_of_all_weights(write: Write) -> None:
    folder = write(FAMILIES["qwen3"], torch.bfloat16)
    report: Report = quantize(job(folder, None, method="rtn", bits=8))
    num_weights = sum(value.numel() for value in stored(folder).values())
    assert report.bits_per_weight == pytest.approx(8 * report.bytes_after / num_weights)
    assert report.bytes_before == 2 * num_weights
