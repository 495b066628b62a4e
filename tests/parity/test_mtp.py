"""The multi-token-prediction block: read from where DeepSeek-V3 stores it, and equal to transformers' one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config
from transformers.modeling_layers import MtpModel

from seamount.core.errors import CheckpointError
from seamount.models.batch import Batch

LAYERS = 2
CONFIG = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 48,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 1,
}


def store_mtp(folder: Path, block: MtpModel) -> dict[str, torch.Tensor]:
    """Add the block to the checkpoint as layer `LAYERS`, in the released spelling; returns what was added."""
    added: dict[str, torch.Tensor] = {}
    prefix = f"model.layers.{LAYERS}."
    for name, value in [*block.layers[0].named_parameters(), *block.layers[0].named_buffers()]:
        key = prefix + name.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
        if key.endswith("experts.gate_up_proj"):
            for expert, part in enumerate(value):
                gate, up = part.chunk(2)
                stem = key.replace("gate_up_proj", f"{expert}")
                added |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif key.endswith("experts.down_proj"):
            for expert, part in enumerate(value):
                added[key.replace("down_proj", f"{expert}.down_proj.weight")] = part
        else:
            added[key] = value
    added[prefix + "embed_tokens.weight"] = torch.zeros(CONFIG["vocab_size"], CONFIG["hidden_size"])
    added[prefix + "shared_head.head.weight"] = torch.zeros(CONFIG["vocab_size"], CONFIG["hidden_size"])
    tensors = load_file(folder / "model.safetensors") | added
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return added


def make(write_checkpoint: Any, randomiser: Any) -> tuple[Path, Any, MtpModel]:
    folder, reference = write_checkpoint(DeepseekV3Config(**CONFIG))
    block = MtpModel(reference, 1).eval()
    randomiser(block.layers, 3)
    store_mtp(folder, block)
    return folder, reference, block


def test_block_equals_that_of_transformers(write_checkpoint: Any, load: Any, randomiser: Any) -> None:
    folder, reference, block = make(write_checkpoint, randomiser)
    model = load(folder, packed=False)
    tokens = torch.randint(0, CONFIG["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(1))
    known, following = tokens[:, :-1], tokens[:, 1:]
    with torch.inference_mode():
        out = reference(known, output_hidden_states=True)
        positions = torch.arange(known.shape[1]).unsqueeze(0)
        theirs = block.forward_layer(0, out.hidden_states[-1], positions, None, input_ids=following)
        theirs = reference.lm_head(theirs)[0]
        batch = Batch.without_cache(known)
        ours = model.logits(model.mtp_hidden(model(batch, None), following[0], batch))
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() < 1e-4


def test_block_leaves_ordinary_generation_alone(
    write_checkpoint: Any,
    load: Any,
    randomiser: Any,
    paged_driver: Any,
    prompts: Any,
    reference_logits: Any,
    reference_greedy: Any,
    engine_greedy: Any,
) -> None:
    folder, reference, _ = make(write_checkpoint, randomiser)
    theirs = reference_logits(reference, prompts)
    for mine, other in zip(paged_driver(load(folder)).all_logits(prompts), theirs, strict=True):
        assert (mine - other).abs().max() < 1e-4
    assert engine_greedy(folder, prompts, 64) == reference_greedy(reference, prompts, 64)


def test_declared_and_dropped_by_a_converter_is_said_and_loads(
    write_checkpoint: Any, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = write_checkpoint(DeepseekV3Config(**CONFIG))  # transformers does not write the block
    with caplog.at_level(logging.WARNING):
        model = load(folder, packed=False)
    assert len(model.mtp) == 0
    assert "multi-token-prediction" in caplog.text


def test_half_a_block_is_refused(write_checkpoint: Any, load: Any, randomiser: Any) -> None:
    folder, *_ = make(write_checkpoint, randomiser)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.{LAYERS}.eh_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"layers\.{LAYERS}\.eh_proj\.weight"):
        load(folder)
