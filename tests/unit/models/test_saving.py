"""Folders that we write: ours and transformers read the same network from them."""

import json

import pytest
import torch

from seamount.core.errors import CheckpointError
from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.loading import load_model
from seamount.models.network import build_network
from seamount.models.saving import save_folder

RAW = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def random_tensors():
    model = build_network(ModelConfig.from_dict(RAW))
    generator = torch.Generator().manual_seed(0)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: 1.0 * (t.ndim == 1) + 0.1 * torch.randn(t.shape, generator=generator) for name, t in named}


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    tensors = random_tensors()
    num_bytes = save_folder(tmp_path, RAW, tensors, torch.bfloat16)
    assert num_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    config = ModelConfig.from_folder(tmp_path)
    model = load_model(tmp_path, config, dtype=torch.bfloat16, device=torch.device("cpu"), packed=False)
    read = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert config.num_mtp_layers == 1
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        exact = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        assert torch.equal(read[name], exact), name


def test_transformers_gives_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_folder(tmp_path, RAW, random_tensors(), torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = load_model(
        tmp_path, ModelConfig.from_folder(tmp_path), dtype=torch.float32, device=torch.device("cpu"), packed=False
    )
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs(ids).logits
        found = ours.logits(ours(Batch.without_cache(ids), None)).view_as(wanted)
    assert (wanted - found).abs().max() < 1e-4


def test_missing_and_wrongly_shaped_tensors_are_named(tmp_path):
    tensors = random_tensors()
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        save_folder(tmp_path, RAW, {k: v for k, v in tensors.items() if k != "norm.weight"}, torch.bfloat16)
    with pytest.raises(CheckpointError, match="lm_head"):
        save_folder(tmp_path, RAW, {**tensors, "lm_head.weight": torch.zeros(8, 32)}, torch.bfloat16)
    assert not (tmp_path / "model.safetensors").exists()
