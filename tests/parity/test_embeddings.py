"""Embeddings equal transformers' hidden states, pooled here by plain torch, over the whole engine.

In fp32 the two differ by rounding only: the angle between them has a cosine above 1 - 1e-6.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, DeepseekV3Config, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from seamount import LLM
from seamount.core.errors import InvalidRequestError

VOCAB = 307
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LATENT = SMALL | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
FAMILIES: dict[str, Any] = {
    "qwen3-tied": lambda: Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=True),
    "qwen3-untied": lambda: Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "deepseek-v3": lambda: DeepseekV3Config(**LATENT, tie_word_embeddings=False),
}
MODES = {"lasttoken": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


def list_modules(folder: Path, mode: str, *, normalize: bool) -> None:
    """What sentence-transformers writes beside the weights, with pooling as switches, as most folders have it."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    switches = {switch: name == mode for name, switch in MODES.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **switches}))


@pytest.fixture
def write_base(tmp_path: Path, write_checkpoint: Callable[..., Any], randomiser: Callable[..., None]) -> Any:
    """Returns a function: config to a folder of a model saved as `AutoModel` has it, and that model."""

    def write(config: Any) -> tuple[Path, PreTrainedModel]:
        write_checkpoint(config)  # for its tokenizer; the weights are written over
        for old in tmp_path.glob("*.safetensors"):
            old.unlink()
        model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        randomiser(model, 3)
        model.save_pretrained(tmp_path)
        return tmp_path, model

    return write


def reference(model: PreTrainedModel, prompts: Sequence[Sequence[int]], mode: str, *, normalize: bool) -> torch.Tensor:
    rows = []
    for prompt in prompts:
        with torch.inference_mode():
            states = model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
        rows.append({"lasttoken": states[-1], "mean": states.mean(dim=0), "cls": states[0]}[mode])
    found = torch.stack(rows)
    return F.normalize(found, dim=-1) if normalize else found


def embed(folder: Path, prompts: Sequence[Sequence[int]], **options: Any) -> torch.Tensor:
    """Side by side, in small chunks and blocks."""
    llm = LLM(
        str(folder),
        dtype="float32",
        device="cpu",
        num_threads=1,
        cache_memory_bytes=2**21,
        block_size=4,
        max_num_seqs=8,
        max_step_tokens=16,
    )
    return torch.tensor(llm.embed([list(prompt) for prompt in prompts], **options))


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float(F.cosine_similarity(ours.double(), theirs.double()).min()) > 1 - 1e-6
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_in_the_layout_of_sentence_transformers(family, mode, write_base, prompts) -> None:
    folder, model = write_base(FAMILIES[family]())
    list_modules(folder, mode, normalize=True)
    assert_equal(embed(folder, prompts), reference(model, prompts, mode, normalize=True))


@pytest.mark.parametrize("mode", MODES)
def test_without_normalize_the_length_is_kept(mode, write_base, prompts) -> None:
    folder, model = write_base(FAMILIES["qwen3-tied"]())
    list_modules(folder, mode, normalize=False)
    assert_equal(embed(folder, prompts), reference(model, prompts, mode, normalize=False))


def test_a_base_model_with_nothing_beside_it(write_base, prompts) -> None:
    folder, model = write_base(FAMILIES["qwen2"]())
    assert_equal(embed(folder, prompts), reference(model, prompts, "lasttoken", normalize=True))


@pytest.mark.parametrize("family", ["qwen3-tied", "llama"])
def test_a_model_with_a_head_embeds_and_generates(
    family, write_checkpoint, prompts, engine_greedy, reference_greedy
) -> None:
    folder, model = write_checkpoint(FAMILIES[family]())
    list_modules(folder, "mean", normalize=True)
    assert_equal(embed(folder, prompts), reference(model.model, prompts, "mean", normalize=True))
    assert engine_greedy(folder, prompts, 5) == reference_greedy(model, prompts, 5)


def test_leading_numbers_are_cut_before_they_are_scaled(write_base, prompts, config_editor) -> None:
    folder, model = write_base(FAMILIES["qwen3-tied"]())
    list_modules(folder, "lasttoken", normalize=True)
    with pytest.raises(InvalidRequestError, match="dimensions"):
        embed(folder, prompts, dimensions=16)
    config_editor(folder, is_matryoshka=True)
    expected = F.normalize(reference(model, prompts, "lasttoken", normalize=False)[:, :16], dim=-1)
    assert_equal(embed(folder, prompts, dimensions=16), expected)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights_give_nearly_the_same_direction(quantization, write_base, prompts) -> None:
    from seamount import kernels

    if kernels.library() is None:
        pytest.skip("rounding needs the compiled kernels")
    folder, _ = write_base(FAMILIES["qwen3-tied"]())
    list_modules(folder, "mean", normalize=True)
    options = {"device": "cpu", "num_threads": 1, "cache_memory_bytes": 2**21}
    plain, rounded = (
        torch.tensor(LLM(str(folder), quantization=how, dtype="bfloat16", **options).embed(prompts))
        for how in ("none", quantization)
    )
    assert float(F.cosine_similarity(plain, rounded).min()) > {"int8": 0.99, "int4": 0.9}[quantization]
