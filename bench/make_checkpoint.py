"""Write a randomly initialised checkpoint with the true shape of a known model, to measure loading and serving with.

    python bench/make_checkpoint.py r1-distill-qwen-1.5b /tmp/checkpoint

Weights are bfloat16 with the spread of trained ones (norms near one, matrices with variance 1 / columns), written
tensor by tensor, so that memory stays small. The tokenizer is synthetic: bytes, pairs of letters, and made-up words
up to the model's vocabulary. What such a model answers is noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch

from seamount.models.checkpoint import INDEX_NAME
from seamount.models.config import ModelConfig
from seamount.models.keymap import Placement, placements

_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "r1-distill-qwen-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rope_theta": 10000,
    },
    "r1-distill-llama-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3,
    },
    "v2-lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
    },
    "v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
    },
}
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}

_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_SPECIAL = [_BOS, _EOS, "<｜User｜>", "<｜Assistant｜>"]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}<｜User｜>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<｜Assistant｜>{{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
_CHUNK_VALUES = 2**22


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="is made; must not hold weights yet")
    parser.add_argument("--layers", type=int, help="write only so many ordinary layers")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="most bytes per file, in 10^9 (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    raw = _COMMON | SHAPES[options.shape]
    if options.layers is not None:
        raw["num_hidden_layers"] = options.layers
    if list(options.folder.glob("*.safetensors")):
        sys.exit(f"{options.folder} holds weights already.")
    write_checkpoint(raw, options.folder, shard_bytes=int(options.shard_gb * 1e9), seed=options.seed)


def write_checkpoint(raw: dict[str, Any], folder: Path, *, shard_bytes: int, seed: int) -> None:
    """Write config, tokenizer and weights of the network that `raw`, a config.json, describes."""
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = _write_tokenizer(folder, raw["vocab_size"])
    raw = raw | {"bos_token_id": bos, "eos_token_id": eos}
    config = ModelConfig.from_dict(raw)
    _write_json(folder / "config.json", raw)
    _write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    shards = list(_shards(config, shard_bytes))
    total = sum(2 * place.num_values for shard in shards for place in shard)
    torch.manual_seed(seed)
    weight_map, done = {}, 0
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            _write_header(file, shard)
            for place in shard:
                for values in _random_chunks(place):
                    file.write(values.view(torch.uint8).numpy().data)
                    done += values.nbytes
                weight_map[place.key] = name
                print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if len(shards) > 1:
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(config: ModelConfig, shard_bytes: int) -> Iterator[list[Placement]]:
    shard: list[Placement] = []
    size = 0
    for place in placements(config):
        if shard and size + 2 * place.num_values > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(place)
        size += 2 * place.num_values
    yield shard


def _write_header(file: BinaryIO, shard: list[Placement]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for place in shard:
        end = offset + 2 * place.num_values
        header[place.key] = {"dtype": "BF16", "shape": place.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _random_chunks(place: Placement) -> Iterator[torch.Tensor]:
    mean, spread = 0.0, place.shape[-1] ** -0.5
    if len(place.shape) == 1:
        mean, spread = (1.0 if place.key.endswith("norm.weight") else 0.0), 0.05
    for start in range(0, place.num_values, _CHUNK_VALUES):
        count = min(_CHUNK_VALUES, place.num_values - start)
        yield torch.randn(count).mul_(spread).add_(mean).to(torch.bfloat16)


def _write_tokenizer(folder: Path, vocab_size: int) -> tuple[int, int]:
    """Byte-level BPE; returns the ids of the begin and end tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    tokens = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(len(others))]
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [list(pair) for pair in [*product(letters, letters), *product("Ġ", letters)]]
    tokens += ["".join(pair) for pair in merges]
    words = vocab_size - len(tokens) - len(_SPECIAL)
    tokens += [f"Ġword{i}" for i in range(words)] + _SPECIAL
    ids = {token: i for i, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **flags} for token in _SPECIAL],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": ids, "merges": merges},
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    named = {"bos_token": _BOS, "eos_token": _EOS, "chat_template": _TEMPLATE}
    _write_json(folder / "tokenizer_config.json", named)
    return ids[_BOS], ids[_EOS]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
