"""FP8 block checkpoints, half precision, and weights with outliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config

from seamount.models.config import ModelConfig
from seamount.models.loading import load_model

V3 = {
    "vocab_size": 307,
    "hidden_size": 160,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 144,
    "kv_lora_rank": 136,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 40,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}


def quantize_folder(folder: Path, editor: Any) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint as DeepSeek-V3 was released, scales in a second shard; returns the values meant."""
    tensors = load_file(folder / "model.safetensors")
    meant, weights, scales = dict(tensors), {}, {}
    for name, value in tensors.items():
        is_linear = value.dim() == 2 and not any(part in name for part in ("embed", "lm_head", "gate.weight"))
        if not is_linear:
            weights[name] = value
            continue
        rows, columns = value.shape
        scale = torch.zeros(-(-rows // 128), -(-columns // 128))
        stored, expanded = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scale[i, j] = value[block].abs().max() / 448
                stored[block] = (value[block] / scale[i, j]).to(torch.float8_e4m3fn)
                expanded[block] = stored[block].float() * scale[i, j]
        weights[name], scales[name + "_scale_inv"], meant[name] = stored, scale, expanded
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-00001-of-00002.safetensors")
    save_file(scales, folder / "model-00002-of-00002.safetensors")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    editor(folder, quantization_config=quantization, dtype="bfloat16")
    return meant


def test_fp8_blocks_give_what_their_dequantized_weights_give(
    write_checkpoint: Any,
    load: Any,
    paged_driver: Any,
    prompts: Any,
    reference_logits: Any,
    reference_greedy: Any,
    engine_greedy: Any,
    config_editor: Any,
) -> None:
    folder, reference = write_checkpoint(DeepseekV3Config(**V3))
    before = reference_logits(reference, prompts)
    meant = quantize_folder(folder, config_editor)
    model, plain = load(folder), load(folder, packed=False)
    experts = "model.layers.1.mlp.experts"
    assert torch.equal(plain.layers[1].mlp.experts.down_proj[2], meant[f"{experts}.2.down_proj.weight"])
    with torch.no_grad():  # the reference runs on the values that the FP8 blocks stand for
        for name, value in reference.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                for e, part in enumerate(value):
                    parts = [meant[f"{experts}.{e}.{half}_proj.weight"] for half in ("gate", "up")]
                    part.copy_(torch.cat(parts))
            elif name.endswith("experts.down_proj"):
                for e, part in enumerate(value):
                    part.copy_(meant[f"{experts}.{e}.down_proj.weight"])
            else:
                value.copy_(meant[name])
    ours, theirs = paged_driver(model).all_logits(prompts), reference_logits(reference, prompts)
    for mine, other, unquantized in zip(ours, theirs, before, strict=True):
        assert (mine - other).abs().max() < 1e-4
        assert (mine - unquantized).abs().max() > 1e-2
    assert engine_greedy(folder, prompts, 64) == reference_greedy(reference, prompts, 64)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, DeepseekV3Config])
def test_outliers_do_not_hide_a_difference(
    kind: Any, write_checkpoint: Any, load: Any, paged_driver: Any, prompts: Any, reference_logits: Any
) -> None:
    folder, reference = write_checkpoint(kind(**V3), outliers=True)
    theirs = reference_logits(reference, prompts)
    for mine, other in zip(paged_driver(load(folder)).all_logits(prompts), theirs, strict=True):
        assert (mine - other).abs().max() < 1e-4 * max(1.0, float(other.std()))
        assert torch.equal(mine.argmax(-1), other.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32(
    dtype: torch.dtype, write_checkpoint: Any, reference_logits: Any, paged_driver: Any, prompts: Any
) -> None:
    folder, reference = write_checkpoint(DeepseekV3Config(**V3), max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    config = ModelConfig.from_folder(folder)
    model = load_model(folder, config, dtype=dtype, device=torch.device("cpu"))
    plain = load_model(folder, config, dtype=dtype, device=torch.device("cpu"), packed=False)
    assert plain.layers[0].self_attn.o_proj.weight.dtype == dtype
    driver = paged_driver(model, dtype=dtype)
    for mine, other in zip(driver.all_logits(prompts), reference_logits(reference, prompts), strict=True):
        correlation = torch.corrcoef(torch.stack((mine.flatten(), other.flatten())))[0, 1]
        assert correlation > 0.99
