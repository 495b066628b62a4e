"""The engine on a GPU: what it says equals the CPU's, and decode graphs change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seamount import LLM, SamplingParams
from seamount.engine.graphs import DecodeGraphs
from seamount.models.batch import Batch, Piece
from seamount.models.config import ModelConfig
from seamount.models.network import CausalLM

BLOCK = 16
LATENT = {
    "model_type": "deepseek_v2",
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    network = CausalLM(ModelConfig.from_dict(LATENT)).to("cuda", torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.fill_(1.0)
    return network


@pytest.mark.parametrize("num_sequences", [1, 2, 4])
@torch.inference_mode()
def test_a_replayed_step_is_the_eager_one_to_the_bit(model: CausalLM, num_sequences: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    caches = [model.cache_spec.allocate(64 * BLOCK, torch.bfloat16, device) for _ in range(2)]
    tables = [[4 * s + i for i in (2, 0, 3, 1)] for s in range(num_sequences)]
    prompts = [[(7 * s + 3 * i) % 500 for i in range(20 + s)] for s in range(num_sequences)]
    prefill: list[Piece] = [(prompt, 0, table) for prompt, table in zip(prompts, tables, strict=True)]
    for cache in caches:
        model(Batch.over_cache(prefill, BLOCK, device), cache)
    graphs = DecodeGraphs(model, caches[0], block_size=BLOCK, max_blocks=4, max_num_seqs=num_sequences, device=device)
    tokens = [5] * num_sequences
    for step in range(30):
        pieces: list[Piece] = [([tokens[s]], 20 + s + step, tables[s]) for s in range(num_sequences)]
        replayed = graphs.run(pieces).clone()
        assert torch.equal(replayed, model(Batch.over_cache(pieces, BLOCK, device), caches[1]))
        tokens = model.logits(replayed).argmax(dim=-1).tolist()


def test_the_engine_says_on_a_gpu_what_it_says_on_a_cpu(small_checkpoint: Path) -> None:
    prompts = ["a", "The quick brown fox", "12 + 30 = "]
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    said = {}
    for device in ("cpu", "cuda"):
        llm = LLM(str(small_checkpoint), device=device, max_model_len=256)
        together = [output.token_ids for output in llm.generate(prompts, greedy)]
        alone = [llm.generate([prompt], greedy)[0].token_ids for prompt in prompts]
        said[device] = (together, alone)
    assert said["cuda"] == said["cpu"]
