"""What `inspect` says of a folder, without reading its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seamount import kernels
from seamount.core.errors import CheckpointError, ConfigError
from seamount.core.settings import EngineConfig
from seamount.kernels import hardware
from seamount.models.config import ModelConfig
from seamount.models.footprint import workspace_bytes
from seamount.models.keymap import placements
from seamount.models.quantized_config import int8_config
from seamount.ops import inspection
from seamount.ops.inspection import inspect_checkpoint

CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if thinking is defined and not thinking %}</think>{% else %}<think>\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {p.key: torch.zeros(p.shape, dtype=torch.bfloat16) for p in placements(ModelConfig.from_dict(CONFIG))}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    vocab = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


def test_a_sound_checkpoint(folder: Path) -> None:
    found = inspect_checkpoint(folder, device="cpu")
    assert (found.family, found.num_mtp_layers, found.num_files) == ("deepseek_v3", 1, 1)
    assert found.num_mtp_parameters > 0
    assert found.stored_bytes == {"BF16": 2 * (found.num_parameters + found.num_mtp_parameters + 2 * 4)}
    assert found.num_active_parameters < found.num_parameters
    assert found.cache_bytes_per_token == 2 * (8 + 2) * 2  # layers, latent and key, bytes; the MTP block is not loaded
    assert (found.dtype, found.device) == ("bfloat16", "cpu")
    assert found.fits and found.fitting_context == found.declared_context == 4096
    assert (found.tokenizer_size, found.template_source) == (256, "checkpoint")
    assert found.starts_in_reasoning and found.thinking_switch == "thinking"
    assert found.shortage is None


def test_json_and_rows_say_the_same(folder: Path) -> None:
    found = inspect_checkpoint(folder, device="cpu", dtype="float32")
    parsed = json.loads(found.to_json())
    assert parsed["fits"] is True and parsed["weight_bytes"] == found.weight_bytes
    rows = dict(found.rows())
    assert rows["Family"] == parsed["family"]
    assert "float32" in rows["Runs on"]
    assert f"{parsed['cache_bytes_per_token']:,}" in rows["Cache per token"]


def test_weights_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pytest.fail("memory was allocated"))
    assert inspect_checkpoint(folder, device="cpu").num_parameters > 0


def test_what_a_folder_is_good_for_is_said(folder: Path) -> None:
    found = inspect_checkpoint(folder, device="cpu")
    assert (found.embeddings, found.generates) == (None, True)
    assert dict(found.rows())["Embeddings"] == "no"
    (folder / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["DeepseekV3Model"]}))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, folder / "model.safetensors")
    row = dict(inspect_checkpoint(folder, device="cpu").rows())["Embeddings"]
    assert row == (
        "the last token's hidden state, scaled to length 1; 16 numbers, texts up to 4,096 tokens; it continues no text"
    )


def test_too_little_memory_is_said_with_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "available_bytes", lambda device: 2**20)
    found = inspect_checkpoint(folder, device="cpu")
    assert not found.fits and found.fitting_context == 0
    assert "1.05 MB of memory is free" in (found.shortage or "")
    assert dict(found.rows())["Fits"].startswith("no: ")


def test_a_shorter_context_is_warned_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect_checkpoint(folder, device="cpu")
    defaults = EngineConfig()
    workspace = workspace_bytes(
        ModelConfig.from_dict(CONFIG | {"num_nextn_predict_layers": 0}),
        step_tokens=defaults.max_step_tokens,
        num_sequences=defaults.max_num_seqs,
    )
    room = found.weight_bytes + workspace + 2000 * found.cache_bytes_per_token
    monkeypatch.setattr(inspection, "available_bytes", lambda device: room)
    short = inspect_checkpoint(folder, device="cpu")
    assert 0 < short.fitting_context < 2000
    assert any(f"{short.fitting_context:,} of 4,096" in warning for warning in short.warnings)


def test_what_is_ignored_and_what_is_missing_is_warned_of(folder: Path) -> None:
    (folder / "modeling_deepseek.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "tokenizer.json").unlink()
    tensors = {
        p.key: torch.zeros(p.shape) for p in placements(ModelConfig.from_dict(CONFIG)) if "layers.2." not in p.key
    }
    save_file(tensors, folder / "model.safetensors")
    found = inspect_checkpoint(folder, device="cpu")
    text = " ".join(found.warnings)
    for words in ("modeling_deepseek.py", "pytorch_model.bin", "multi-token-prediction", "tokenizer cannot be used"):
        assert words in text
    assert (found.num_mtp_layers, found.tokenizer_size) == (0, 0)


def test_a_broken_template_does_not_hide_the_rest(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    found = inspect_checkpoint(folder, device="cpu")
    assert found.num_parameters > 0
    assert any("chat template cannot be used" in warning for warning in found.warnings)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 32}))
    with pytest.raises(CheckpointError, match="shape"):
        inspect_checkpoint(folder)


def test_an_unknown_device_is_refused(folder: Path) -> None:
    for name in ("tpu9", "meta"):
        with pytest.raises(ConfigError, match=name):
            inspect_checkpoint(folder, device=name)


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f amx_bf16\n", ("avx2", "avx512f", "amx_bf16")),
        ("Features\t: fp asimd bf16\n", ("asimd", "bf16")),
        ("nothing", ()),
    ],
)
def test_cpu_features(tmp_path: Path, text: str, features: Any) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert hardware.cpu_features(tmp_path / "cpuinfo") == features
    assert hardware.cpu_features(tmp_path / "nowhere") == ()


def test_a_quantized_checkpoint_says_its_format_and_what_it_is_held_in(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    tensors[f"{name}_scale"] = torch.ones(tensors[name].shape[0], 1)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": int8_config()}))
    found = inspect_checkpoint(folder, device="cpu")
    assert found.stored_as == "safetensors, int-quantized in 8 bits, a scale per row"
    assert found.stored_bytes["I8"] == tensors[name].numel()
    if kernels.library() is not None:
        assert kernels.isa_name() in found.kernels
        assert "int8" in found.kernels and "bfloat16" in found.kernels
        rounded = inspect_checkpoint(folder, device="cpu", quantization="int4")
        assert "int4" in rounded.kernels
