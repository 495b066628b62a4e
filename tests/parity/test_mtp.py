"""The multi-token-prediction block: read from where DeepSeek-V3 stores it, and equal to transformers' one."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config
from transformers.modeling_layers import MtpModel

from seamount import LLM, SamplingParams
from seamount.core.errors import CheckpointError
from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.loading import load_model

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


def reference_guess(reference: Any, block: MtpModel, tokens: list[int]) -> torch.Tensor:
    """Logits `[T, V]` of transformers' block: at each of `tokens[:-1]`, of the token after the next."""
    known, following = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
    with torch.inference_mode():
        out = reference(known, output_hidden_states=True)
        positions = torch.arange(known.shape[1]).unsqueeze(0)
        hidden = block.forward_layer(0, out.hidden_states[-1], positions, None, input_ids=following)
        return reference.lm_head(hidden)[0]


def random_tokens(count: int) -> list[int]:
    chance = random.Random(count)
    return [chance.randrange(CONFIG["vocab_size"]) for _ in range(count)]


def test_block_equals_that_of_transformers(write_checkpoint: Any, randomiser: Any) -> None:
    """As it is trained: whole sequences, no cache."""
    folder, reference, block = make(write_checkpoint, randomiser)
    config = ModelConfig.from_folder(folder)
    model = load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"), packed=False)
    tokens = random_tokens(30)
    theirs = reference_guess(reference, block, tokens)
    with torch.inference_mode():
        batch = Batch.without_cache(torch.tensor([tokens[:-1]]))
        ours = model.logits(model.mtp_hidden(model(batch, None), torch.tensor(tokens[1:]), batch))
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("length", [1, 4, 5, 23])
def test_block_over_the_cache_equals_that_of_transformers(
    write_checkpoint: Any, load: Any, randomiser: Any, length: int
) -> None:
    """As the engine runs it: filled in chunks behind the model, and attended to from the last position or from all."""
    folder, reference, block = make(write_checkpoint, randomiser)
    model, tokens, chance = load(folder), random_tokens(length + 1), random.Random(length)
    theirs = reference_guess(reference, block, tokens)
    blocks = chance.sample(range(12), 12)
    cache = model.cache_spec.allocate(12 * 4, torch.float32, torch.device("cpu"))
    for (part,) in cache:
        part.fill_(777.0)
    done = 0
    with torch.inference_mode():
        while done < length:
            end = min(done + chance.randint(1, 6), length)
            batch = Batch.over_cache([(tokens[done:end], done, blocks)], 4)
            joined = model.mtp_join(model(batch, cache), model.embed(torch.tensor(tokens[done + 1 : end + 1])))
            model.mtp_fill(joined, model.rotary.angles(batch.positions), batch, cache)
            done = end
        last = Batch.over_cache([([0], length - 1, blocks)], 4)
        angles = model.rotary.angles(last.positions)
        ours = model.logits(model.mtp_guess(joined[-1:].clone(), angles, last, cache))
        assert (ours - theirs[-1:]).abs().max() < 1e-4
        whole = Batch.over_cache([(tokens[:-1], 0, blocks)], 4)
        joined = model.mtp_join(model(whole, cache), model.embed(torch.tensor(tokens[1:])))
        angles = model.rotary.angles(whole.positions)
        at_once = model.logits(model.mtp_guess(joined, angles, whole, cache))
        assert (at_once - theirs).abs().max() < 1e-4


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


def test_guesses_of_a_random_block_are_wrong_and_harmless(
    write_checkpoint: Any, randomiser: Any, prompts: Any, reference_greedy: Any
) -> None:
    folder, reference, _ = make(write_checkpoint, randomiser)
    llm = LLM(str(folder), dtype="float32", num_threads=1, cache_memory_bytes=2**21, block_size=4, speculation="mtp")
    sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    found = [list(completion.token_ids) for completion in llm.generate(prompts, sampling)]
    assert found == reference_greedy(reference, prompts, 32)
    stats = llm.stats()
    assert stats.num_draft_tokens > 32
    assert stats.num_accepted_tokens < stats.num_draft_tokens / 4


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
