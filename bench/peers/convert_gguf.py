"""Write a checkpoint as GGUF for llama.cpp; runs inside its environment.

    python convert_gguf.py FOLDER FILE Q8_0|Q4_0|BF16

Every matrix gets the named type, the output head too; norms, biases and the experts' router stay 32-bit. Tensor and
key names follow GGUF's own tables (package `gguf`) and what llama.cpp's loader asks for.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
}


def main() -> None:
    """Parse the command line and write the file; a half-written one never has its name."""
    folder, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), gguf.GGMLQuantizationType[sys.argv[3]]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arch = _ARCHITECTURES.get(config["model_type"])
    if arch is None or (arch is gguf.MODEL_ARCH.LLAMA):
        sys.exit(f"no GGUF conversion is written for model_type {config['model_type']}")
    partial = target.with_suffix(".tmp")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    _write_facts(writer, config)
    if arch is gguf.MODEL_ARCH.DEEPSEEK2:
        _write_latent_facts(writer, config)
    _write_vocabulary(writer, folder, config)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for key, values in _tensors(folder, config):
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            sys.exit(f"GGUF has no name for {key}")
        small = values.ndim == 1 or "ffn_gate_inp" in name
        raw = gguf.GGMLQuantizationType.F32 if small else kind
        writer.add_tensor(name, gguf.quants.quantize(values, raw), raw_dtype=raw)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def _write_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "kv_lora_rank" not in config:
        writer.add_head_count_kv(config["num_key_value_heads"])


def _write_latent_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """llama.cpp runs latent attention as one shared head of the latent's width, and expands the values after it."""
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    # The loader asks for it except at two depths that it knows; 0 says that queries have no latent.
    writer.add_q_lora_rank(config.get("q_lora_rank") or 0)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    sigmoid = config.get("scoring_func") == "sigmoid"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    scaling = config.get("rope_scaling")
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        # The loader multiplies by 10 again.
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def _write_vocabulary(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """Byte-level BPE as it stands; the measured prompts are token ids, so only the ids must be right."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    texts = {i: text for text, i in tokenizer["model"]["vocab"].items()} | special
    ids = range(config["vocab_size"])
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in ids]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(i, f"[unused{i}]") for i in ids])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _tensors(folder: Path, config: dict[str, Any]):
    """Yield key and 32-bit values: experts stacked, the latent's up-projection split, other blocks left out."""
    layers, stacks = config["num_hidden_layers"], {}
    for key, read in _stored(folder):
        found = re.match(r"model\.layers\.(\d+)\.", key)
        if found and int(found[1]) >= layers:
            continue  # multi-token prediction: not used by plain decoding
        if expert := _EXPERT.fullmatch(key):
            layer, number, part = int(expert[1]), int(expert[2]), expert[3]
            stack = stacks.setdefault((layer, part), {})
            stack[number] = read
            if len(stack) == config["n_routed_experts"]:
                merged = np.stack([stack[i]() for i in sorted(stack)])
                del stacks[layer, part]
                yield f"model.layers.{layer}.mlp.experts.{part}_proj.weight", merged
        elif key.endswith("kv_b_proj.weight"):
            heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
            both = read().reshape(heads, nope + config["v_head_dim"], config["kv_lora_rank"])
            yield key.replace("kv_b_proj", "k_b_proj"), np.ascontiguousarray(both[:, :nope].transpose(0, 2, 1))
            yield key.replace("kv_b_proj", "v_b_proj"), np.ascontiguousarray(both[:, nope:])
        elif key.endswith("e_score_correction_bias"):
            yield key.replace("e_score_correction_bias", "e_score_correction.bias"), read()
        else:
            yield key, read()


def _stored(folder: Path):
    """Yield each key of the safetensors files with a function that reads it as 32-bit floats."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                yield key, _reader(path, 8 + length, entry)


def _reader(path: Path, base: int, entry: dict[str, Any]) -> Callable[[], Array]:
    kinds = {"BF16": np.uint16, "F32": np.float32}
    if entry["dtype"] not in kinds:
        sys.exit(f"{path.name} stores {entry['dtype']}; only BF16 and F32 are converted")

    def read() -> Array:
        kind = np.dtype(kinds[entry["dtype"]])
        begin, end = entry["data_offsets"]
        raw = np.fromfile(path, kind, count=(end - begin) // kind.itemsize, offset=base + begin).reshape(entry["shape"])
        return raw if kind == np.float32 else (raw.astype(np.uint32) << 16).view(np.float32)

    return read


if __name__ == "__main__":
    main()
