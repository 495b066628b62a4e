"""AWQ, GPTQ and compressed-tensors folders run with their own precision, and answer as their dequantized weights do.

Small checkpoints are written by transformers and rounded here; the reference is the project's network in plain torch
over the values that the codes stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config

from seamount import kernels
from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.config import ModelConfig
from seamount.models.loading import choose_precision, load_model, plan_load, planned_bytes, resident_bytes
from seamount.models.network import CausalLM
from seamount.models.quantized import ChannelQuantized, GroupQuantized
from seamount.models.quantized_config import awq_config, int8_config
from seamount.models.quantized_formats import encode_awq, encode_int8

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LATENT = SMALL | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, SMALL | {"num_key_value_heads": 2}),
    "v3": (DeepseekV3Config, LATENT),
}
needs_kernels = pytest.mark.skipif(kernels.library() is None, reason=f"no compiled kernels: {kernels.why_missing()}")


def group_quantized(weight: torch.Tensor, group: int) -> GroupQuantized:
    """Rounded to nearest, with zeros that are codes and scales that fp16 holds."""
    grouped = weight.unflatten(1, (-1, group))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half().float().clamp(min=1e-4)
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (grouped / scales.unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, 15)
    return GroupQuantized(codes.flatten(1).to(torch.uint8), scales, zeros, group)


def as_words(codes: torch.Tensor) -> torch.Tensor:
    """`[..., n]` codes of 4 bits to int32 `[..., n / 8]`, lowest bits first."""
    shifts = torch.arange(0, 32, 4)
    return (codes.long().unflatten(-1, (-1, 8)) << shifts).sum(-1).to(torch.uint32).view(torch.int32)


def awq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rounded = group_quantized(weight, 64)
    return encode_awq(rounded), rounded.dequantize()


def gptq(weight: torch.Tensor, order: torch.Tensor | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The first version of the format, which stores zeros less one, with a useless bias of zeros as AutoGPTQ wrote."""
    rounded = group_quantized(weight, 32)
    columns = weight.shape[1]
    groups = torch.arange(columns) // 32 if order is None else order
    stored_zeros = (rounded.zeros.long() - 1) & 15
    parts = {
        "qweight": as_words(rounded.codes.T.unflatten(0, (-1, 8)).transpose(1, 2)).squeeze(-1).contiguous(),
        "qzeros": as_words(stored_zeros.T.contiguous()),
        "scales": rounded.scales.T.half().contiguous(),
        "g_idx": groups.int(),
        "bias": torch.zeros(weight.shape[0], dtype=torch.float16),
    }
    return parts, rounded.scales[:, groups] * (rounded.codes.float() - rounded.zeros[:, groups])


def gptq_reordered(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = torch.arange(weight.shape[1]) // 32
    return gptq(weight, groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))])


def pack_quantized(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """compressed-tensors in 4 bits, symmetric."""
    scales = (weight.unflatten(1, (-1, 32)).abs().amax(2) / 7).clamp(min=1e-4)
    codes = (weight.unflatten(1, (-1, 32)) / scales.unsqueeze(2)).round().clamp(-8, 7).flatten(1)
    parts = {
        "weight_packed": as_words(codes.long() + 8),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, codes * scales.repeat_interleave(32, 1)


def int_quantized(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scales = weight.abs().amax(1) / 127
    rounded = ChannelQuantized((weight / scales.unsqueeze(1)).round().to(torch.int8), scales)
    return encode_int8(rounded), rounded.dequantize()


def pack_config() -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
FORMATS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, int]]] = {
    "awq": (awq, awq_config(64), ("int4", 64)),
    "gptq": (gptq, GPTQ, ("int4", 32)),
    "gptq-reordered": (gptq_reordered, GPTQ | {"desc_act": True}, ("int8", 64)),
    "pack-quantized": (pack_quantized, pack_config(), ("int4", 32)),
    "int-quantized": (int_quantized, int8_config(), ("int8", 64)),
}


def quantize_folder(folder: Path, form: str, skipped: str = "none") -> Path:
    """Round a checkpoint's linear layers in place; returns a copy of the folder with the values that are meant."""
    encode, config, _ = FORMATS[form]
    stored, meant = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = value
        if name.endswith(("_proj.weight", "_mqa.weight")):
            if skipped in name:
                continue
            parts, meant[name] = encode(value)
            del stored[name]
            for role, part in parts.items():
                if role != "bias" or name.replace(".weight", ".bias") not in stored:
                    stored.setdefault(f"{name.removesuffix('weight')}{role}", part)
    for name in meant:  # a layer's own bias, where it has one, wins over AutoGPTQ's zeros
        if name.endswith(".bias"):
            stored[name] = meant[name]
    plain = folder.parent / f"{folder.name}-plain"
    shutil.copytree(folder, plain)
    save_file({name: value.contiguous() for name, value in meant.items()}, plain / "model.safetensors")
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return plain


def load(folder: Path, quantization: Any = "auto", *, packed: bool = True) -> CausalLM:
    config = ModelConfig.from_folder(folder)
    return load_model(folder, config, dtype=torch.float32, device=CPU, quantization=quantization, packed=packed)


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Of the middle token's logits, relative to their spread: one whose router was nearly undecided may be far off."""
    mine, other = torch.cat(ours), torch.cat(theirs)
    return float(((mine - other).norm(dim=1) / (other - other.mean(1, keepdim=True)).norm(dim=1)).median())


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_quantized_folder_answers_as_its_codes_say(
    form: str, family: str, write_checkpoint: Any, paged_driver: Any, prompts: Any
) -> None:
    kind, arguments = FAMILIES[family]
    folder = write_checkpoint(kind(**arguments))[0]
    plain = quantize_folder(folder, form)
    reference = load(plain, packed=False)
    expected = paged_driver(reference).all_logits(prompts)
    model = load(folder)
    down = model.layers[0].mlp.down_proj.packed
    assert (down.kind, down.group) == FORMATS[form][2]
    # The codes are the same; activations are rounded to 8 bits, and 4-bit levels to those of the 8-bit products.
    assert distance(paged_driver(model).all_logits(prompts), expected) < 0.06
    # Asked for numbers instead of codes, nothing is rounded; and in plain torch the values are equal to the bit.
    assert distance(paged_driver(load(folder, "none")).all_logits(prompts), expected) < 1e-4
    for (name, mine), other in zip(load(folder, packed=False).named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, other), name


@needs_kernels
@pytest.mark.parametrize("form", ["awq", "int-quantized"])
def test_memory_is_what_the_plan_says(form: str, write_checkpoint: Any) -> None:
    folder = write_checkpoint(DeepseekV3Config(**LATENT))[0]
    quantize_folder(folder, form)
    plan = plan_load(folder, ModelConfig.from_folder(folder))
    for quantization in ("auto", "none", "int8", "int4"):
        precision = choose_precision(plan, torch.bfloat16, quantization, CPU)  # type: ignore[arg-type]
        model = load_model(folder, plan.config, dtype=torch.bfloat16, device=CPU, quantization=quantization)  # type: ignore[arg-type]
        assert resident_bytes(model) == planned_bytes(plan, precision), quantization


@needs_kernels
def test_layers_that_were_left_out_stay_as_they_are(write_checkpoint: Any, paged_driver: Any, prompts: Any) -> None:
    folder = write_checkpoint(LlamaConfig(**FAMILIES["llama"][1]))[0]
    plain = quantize_folder(folder, "awq", skipped="k_proj")
    model = load(folder)
    assert model.layers[0].self_attn.qkv_proj.packed.kind == "float32"  # one of its parts is
    assert model.layers[0].mlp.down_proj.packed.kind == "int4"
    expected = paged_driver(load(plain, packed=False)).all_logits(prompts)
    assert distance(paged_driver(model).all_logits(prompts), expected) < 0.06


def test_without_compiled_kernels_the_values_are_used(write_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(LlamaConfig(**FAMILIES["llama"][1]))[0]
    plain = quantize_folder(folder, "awq")
    monkeypatch.setattr(kernels, "library", lambda: None)
    model = load(folder)
    assert torch.equal(model.layers[0].mlp.down_proj.weight, load(plain).layers[0].mlp.down_proj.weight)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("form", "edit", "words"),
    [
        ("awq", lambda t: t.pop(f"{UP}.qzeros"), "qzeros"),
        ("awq", lambda t: t.update({f"{UP}.scales": torch.ones(3, 3)}), "scales"),
        ("awq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}), "qweight"),
        ("awq", lambda t: t[f"{UP}.scales"].fill_(torch.nan), "no numbers"),
        ("awq", lambda t: t.update({f"{UP}.bias": torch.ones(192)}), "no place"),
        ("awq", lambda t: t.update({f"{UP}.weight": torch.zeros(192, 128)}), "no place"),
        ("gptq", lambda t: t[f"{UP}.g_idx"].fill_(99), "g_idx"),
        ("pack-quantized", lambda t: t[f"{UP}.weight_shape"].fill_(7), "weight_shape"),
        ("int-quantized", lambda t: t.pop(f"{UP}.weight_scale"), "I8"),
    ],
)
def test_broken_folders_are_refused(form: str, edit: Any, words: str, write_checkpoint: Any) -> None:
    folder = write_checkpoint(LlamaConfig(**FAMILIES["llama"][1]))[0]
    quantize_folder(folder, form)
    change(folder, edit)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
        load(folder)
