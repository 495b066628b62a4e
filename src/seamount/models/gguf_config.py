"""A GGUF file's metadata in the spelling of a Hugging Face folder: config.json and generation_config.json.

Called by whoever opens a .gguf; `ModelConfig.from_dict` and `PromptEncoder` take what comes out, and check its bounds.
Architectures: qwen2, qwen3, llama, deepseek2 (which is DeepSeek-V2, V3, R1 and their kin). Loads no torch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from seamount.core.errors import CheckpointError, UnsupportedModelError

from .checkpoint import open_file, read_at, shown
from .fields import Fields
from .gguf import Gguf

ARCHITECTURES = ("qwen2", "qwen3", "llama", "deepseek2")
ROPE_FACTORS = "rope_freqs.weight"
_MOST = 2**31
# Fields with which other networks than the four are stored under their names.
_FOREIGN = (
    "attention.scale",
    "attention.temperature_scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "rope.dimension_sections",
)
# Llama 3.1 to 3.3 scale their frequencies by these; the file stores only what comes out (and the factor differs).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SIGMOID = 2
# Groups of experts and how many of them are chosen, by router and number of experts: DeepSeek-V2 and V3, whose first
# files were written before these fields existed.
_UNWRITTEN_GROUPS = {("softmax", 160): (8, 3), ("sigmoid", 256): (8, 4)}


def hf_config(file: Gguf) -> dict[str, Any]:
    """Return what config.json of the model would hold.

    Raises:
        CheckpointError: a field is missing or of a wrong type.
        UnsupportedModelError: the architecture, or a variation of it, is one that is not run.
    """
    fields = Fields(file.metadata, str(file.path))
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} holds the architecture {shown(architecture)}, which is not supported.",
            hint=f"Supported: {', '.join(ARCHITECTURES)}.",
        )
    read = _Prefixed(fields, architecture)
    for name in _FOREIGN:
        if read.raw(name):
            raise UnsupportedModelError(f"{file.path}: {architecture}.{name} is set, which is not supported.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no embedding (token_embd.weight).")
    num_mtp = read.integer("nextn_predict_layers", 0)
    config: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": read.integer("embedding_length"),
        "intermediate_size": read.integer("feed_forward_length"),
        # Layers for multi-token prediction are counted in, and left out: `gguf_keymap` ignores their tensors.
        "num_hidden_layers": read.integer("block_count") - num_mtp,
        "num_attention_heads": read.integer("attention.head_count"),
        "max_position_embeddings": read.integer("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "torch_dtype": {0: "float32", 1: "float16"}.get(fields.integer("general.file_type", 0, _MOST, default=2))
        or "bfloat16",
        "rope_theta": read.number("rope.freq_base", 10000.0),
        **_token_ids(fields),
    }
    config |= _deepseek(read, file) if architecture == "deepseek2" else _dense(read, file, config)
    scaling = _rope_scaling(read, file, config)
    return {**config, "rope_scaling": scaling} if scaling else config


def generation_config(file: Gguf) -> dict[str, Any]:
    """Return what generation_config.json of the model would hold: end tokens and recommended sampling.

    Raises:
        CheckpointError: a field is of a wrong type.
    """
    fields = Fields(file.metadata, str(file.path))
    found: dict[str, Any] = _token_ids(fields)
    for name, key in (("temperature", "general.sampling.temp"), ("top_p", "general.sampling.top_p")):
        value = fields.optional_number(key, 0.0, 1e6)
        if value is not None:
            found[name] = value
    top_k = fields.optional_integer("general.sampling.top_k", 0, _MOST)
    return found if top_k is None else {**found, "top_k": top_k}


class _Prefixed:
    """Reads fields of one architecture, whose keys all begin with its name."""

    def __init__(self, fields: Fields, architecture: str) -> None:
        self._fields = fields
        self.architecture = architecture

    def raw(self, name: str) -> Any:
        value = self._fields.raw.get(f"{self.architecture}.{name}")
        return value.any() if isinstance(value, np.ndarray) else value

    def integer(self, name: str, default: int | None = None) -> int:
        return self._fields.integer(f"{self.architecture}.{name}", 0, _MOST, default=default)

    def number(self, name: str, default: float | None = None) -> float:
        return self._fields.number(f"{self.architecture}.{name}", 0.0, 1e12, default=default)

    def boolean(self, name: str, *, default: bool) -> bool:
        return self._fields.boolean(f"{self.architecture}.{name}", default=default)

    def text(self, name: str, default: str) -> str:
        return self._fields.text(f"{self.architecture}.{name}", default)


def _token_ids(fields: Fields) -> dict[str, Any]:
    """Beginning and end tokens; "eot" and "eom" end a turn and a message."""
    found: dict[str, Any] = {}
    bos = fields.optional_integer("tokenizer.ggml.bos_token_id", 0, _MOST)
    if bos is not None:
        found["bos_token_id"] = bos
    ends = [fields.optional_integer(f"tokenizer.ggml.{name}_token_id", 0, _MOST) for name in ("eos", "eot", "eom")]
    unique = [end for end in dict.fromkeys(ends) if end is not None]
    return {**found, "eos_token_id": unique} if unique else found


def _dense(read: _Prefixed, file: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    if read.integer("expert_count", 0):
        raise UnsupportedModelError(f"{file.path}: {read.architecture} with experts is not supported.")
    if 0 < read.integer("attention.sliding_window", 0) < config["max_position_embeddings"]:
        raise UnsupportedModelError(f"{file.path}: sliding windows are not supported.")
    num_heads = config["num_attention_heads"]
    rotated = read.integer("rope.dimension_count", 0)
    head_dim = read.integer("attention.key_length", rotated or config["hidden_size"] // max(num_heads, 1))
    if (rotated or head_dim) != head_dim or read.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{file.path}: heads of {head_dim} columns of which {rotated} are rotated, with values of "
            f"{read.integer('attention.value_length', head_dim)}, are not supported."
        )
    return {
        "model_type": read.architecture,
        "num_key_value_heads": read.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "attention_bias": read.architecture != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _deepseek(read: _Prefixed, file: Gguf) -> dict[str, Any]:
    rope_dim = read.integer("rope.dimension_count")
    # Files made before latent attention was run as such give the expanded sizes under the plain names.
    head_dim = read.integer("attention.key_length_mla", read.integer("attention.key_length", 0))
    q_rank = read.integer("attention.q_lora_rank", 0)
    config: dict[str, Any] = {
        "model_type": "deepseek_v3" if read.integer("expert_gating_func", 0) == _SIGMOID else "deepseek_v2",
        "q_lora_rank": q_rank or None,
        "kv_lora_rank": read.integer("attention.kv_lora_rank"),
        "qk_nope_head_dim": head_dim - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": read.integer("attention.value_length_mla", read.integer("attention.value_length", 0)),
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "num_nextn_predict_layers": 0,
    }
    num_experts = read.integer("expert_count", 0)
    return config | _experts(read, config["model_type"], num_experts) if num_experts else config


def _experts(read: _Prefixed, family: str, num_experts: int) -> dict[str, Any]:
    router = "sigmoid" if family == "deepseek_v3" else "softmax"
    groups, chosen = _UNWRITTEN_GROUPS.get((router, num_experts), (1, 1))
    groups, chosen = read.integer("expert_group_count", groups), read.integer("expert_group_used_count", chosen)
    greedy = "greedy" if groups <= 1 else "group_limited_greedy"
    return {
        "n_routed_experts": num_experts,
        "num_experts_per_tok": read.integer("expert_used_count"),
        "n_shared_experts": read.integer("expert_shared_count", 0),
        "moe_intermediate_size": read.integer("expert_feed_forward_length"),
        "first_k_dense_replace": read.integer("leading_dense_block_count", 0),
        "n_group": max(groups, 1),
        "topk_group": max(chosen, 1),
        "topk_method": "noaux_tc" if router == "sigmoid" else greedy,
        "scoring_func": router,
        "norm_topk_prob": read.boolean("expert_weights_norm", default=False),
        "routed_scaling_factor": read.number("expert_weights_scale", 1.0) or 1.0,
    }


def _rope_scaling(read: _Prefixed, file: Gguf, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = read.text("rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    if kind == "none":
        return None
    factor = read.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{file.path}: rotary scaling {shown(kind)} is not supported.", hint="Supported: linear, yarn, llama3."
        )
    for name in ("yarn_attn_factor", "yarn_ext_factor", "attn_factor"):
        if read.number(f"rope.scaling.{name}", 1.0) != 1.0:
            raise UnsupportedModelError(f"{file.path}: {read.architecture}.rope.scaling.{name} is not supported.")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": read.integer("rope.scaling.original_context_length"),
        "beta_fast": read.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": read.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    multiplier = read.number("rope.scaling.yarn_log_multiplier", 0.0)
    if multiplier:  # a tenth of DeepSeek's mscale_all_dim, which equals its mscale in every released model
        mscale = round(10 * multiplier, 6)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def _llama3_scaling(file: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling from the factors that it divides each frequency by.

    Raises:
        UnsupportedModelError: these factors come from another scaling.
    """
    stored = file.tensors[ROPE_FACTORS]
    half = config["head_dim"] // 2 if "head_dim" in config else 0
    if stored.dtype != "F32" or stored.shape != (half,):
        raise UnsupportedModelError(f"The {stored} is {stored.dtype} {list(stored.shape)}; it must be F32 [{half}].")
    data = bytearray(stored.num_bytes)
    with open_file(stored.path) as source:
        read_at(source, stored.offset, memoryview(data), stored)
    factors = np.frombuffer(data, "<f4")
    factor, theta = float(str(factors.max())) if half else 1.0, config["rope_theta"]
    sane = factor >= 1.0 and theta >= 1.0
    if not sane or not np.allclose(factors, _llama3_factors(factor, theta, half), rtol=1e-4):
        raise UnsupportedModelError(f"The {stored} scales frequencies in a way that is not supported.")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _llama3_factors(factor: float, theta: float, half: int) -> np.ndarray:
    """What each of `half` frequencies is divided by: long waves by `factor`, short ones by 1, others in between."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    frequencies = theta ** (-np.arange(half) / max(half, 1))
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)
