"""What a checkpoint's `config.json` says, as frozen facts: read once, checked, and free of torch.

Every field that the networks use is read here and nowhere else, in the old spelling (`rope_theta`, `rope_scaling`) or
the new one (`rope_parameters`). Nothing of the folder is executed: `auto_map` and Python files are ignored.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seamount.core.errors import CheckpointError, UnsupportedModelError

from .fields import Fields
from .gguf import Gguf
from .gguf_config import hf_config
from .locate import is_gguf
from .quantized_config import QuantizationConfig

MAX_CONFIG_BYTES = 4 * 2**20
DENSE_FAMILIES = ("qwen2", "qwen3", "llama")
DEEPSEEK_FAMILIES = ("deepseek_v2", "deepseek_v3")
FAMILIES = DEEPSEEK_FAMILIES + DENSE_FAMILIES

# Bounds on what a config may ask for: several times beyond the largest model of these families, and small enough that
# no product of two overflows into an absurd allocation before the weights have been compared with it.
_MAX_WIDTH = 2**18
_MAX_LAYERS = 1024
_MAX_VOCAB = 2**22
_MAX_CONTEXT = 2**24


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base `theta` and how positions beyond the trained ones are handled.

    `kind` "yarn" is Peng et al., 2023 (arXiv 2309.00071); "llama3" is Llama 3.1's frequency-dependent scaling; "linear"
    divides positions by `factor`.
    """

    theta: float
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Widths of multi-head latent attention; `q_lora_rank` None means a plain query projection."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    interleaved: bool = True


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts; layers before `num_dense_layers` have none."""

    router: Literal["softmax", "sigmoid"]
    num_experts: int
    num_chosen: int
    num_shared: int
    intermediate_size: int
    num_groups: int
    num_chosen_groups: int
    normalize: bool
    scale: float
    num_dense_layers: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One checkpoint's architecture.

    Attributes:
        family: `model_type` of config.json, one of FAMILIES.
        num_mtp_layers: multi-token-prediction blocks stored behind the ordinary layers.
        max_position: tokens of context that the checkpoint declares.
        dtype: precision of the stored 16- or 32-bit weights.
        quantization: how linear weights are stored, where that is not as numbers of `dtype`. GGUF files say it of
            each tensor instead.
        latent, experts: set for the DeepSeek families only (experts also None where a model has none).
        has_head: hidden states become logits; a model without a head makes embeddings only.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    dtype: Literal["bfloat16", "float16", "float32"]
    quantization: QuantizationConfig | None = None
    num_mtp_layers: int = 0
    latent: LatentConfig | None = None
    experts: ExpertsConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    has_head: bool = True

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` of a checkpoint folder, or what a .gguf file says in its place.

        Raises:
            CheckpointError: the file is missing, broken, or asks for something absurd; names file and field.
            UnsupportedModelError: the architecture, or a variation of it, is one that Seamount does not run.
        """
        if is_gguf(folder):
            return cls.from_dict(hf_config(Gguf.from_file(folder)), where=str(folder))
        path = folder / "config.json"
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise CheckpointError(f"{path} is over {MAX_CONFIG_BYTES} bytes; no config is.")
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as cause:
            raise CheckpointError(
                f"{path} cannot be read: {cause.strerror}.", hint="Give the folder that holds config.json."
            ) from cause
        except (ValueError, RecursionError) as cause:
            raise CheckpointError(f"{path} is not valid JSON: {cause}.") from cause
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} holds {type(raw).__name__}, not an object.")
        return cls.from_dict(raw, where=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, where: str = "config") -> ModelConfig:
        """As `from_folder`, from the parsed object; `where` names its source in errors."""
        fields = Fields(raw, where)
        family = fields.text("model_type")
        if family not in FAMILIES:
            raise UnsupportedModelError(
                f"{where}: model_type {family!r} is not supported.", hint=f"Supported: {', '.join(FAMILIES)}."
            )
        if fields.text("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(f"{where}: hidden_act {raw['hidden_act']!r}; only silu is supported.")
        hidden_size = fields.integer("hidden_size", 1, _MAX_WIDTH)
        num_heads = fields.integer("num_attention_heads", 1, 4096)
        max_position = fields.integer("max_position_embeddings", 1, _MAX_CONTEXT)
        common: dict[str, Any] = {
            "family": family,
            "vocab_size": fields.integer("vocab_size", 1, _MAX_VOCAB),
            "hidden_size": hidden_size,
            "intermediate_size": fields.integer("intermediate_size", 1, _MAX_WIDTH),
            "num_layers": fields.integer("num_hidden_layers", 1, _MAX_LAYERS),
            "num_heads": num_heads,
            "norm_eps": fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
            "max_position": max_position,
            "tie_embeddings": fields.boolean("tie_word_embeddings", default=False),
            "rope": _rope(fields, max_position),
            "dtype": _dtype(fields),
            "quantization": QuantizationConfig.from_config(raw, where=where),
            "bos_token_id": fields.optional_integer("bos_token_id", 0, _MAX_VOCAB),
            "eos_token_ids": fields.integers("eos_token_id", 0, _MAX_VOCAB),
            "has_head": _has_head(raw),
        }
        attention_bias = fields.boolean("attention_bias", default=False)
        if family in DEEPSEEK_FAMILIES:
            return cls(**common, **_deepseek(fields, family, num_heads, attention_bias))
        return cls(**common, **_dense(fields, family, hidden_size, num_heads, attention_bias))


def _has_head(raw: dict[str, Any]) -> bool:
    """Whether the class that was saved ends in a head: a base model, such as `Qwen3Model`, does not."""
    names = raw.get("architectures")
    is_base = (
        isinstance(names, list) and names and all(isinstance(name, str) and name[-5:] == "Model" for name in names)
    )
    return not is_base


def _dense(fields: Fields, family: str, hidden_size: int, num_heads: int, attention_bias: bool) -> dict[str, Any]:
    if fields.boolean("use_sliding_window", default=False):
        raise UnsupportedModelError(f"{fields.where}: use_sliding_window is on; sliding windows are not supported.")
    num_kv_heads = fields.integer("num_key_value_heads", 1, num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{fields.where}: {num_heads} heads do not divide into {num_kv_heads} key-value heads.")
    fallback = 128 if family == "qwen3" else max(hidden_size // num_heads, 1)
    head_dim = fields.integer("head_dim", 2, _MAX_WIDTH, default=fallback)
    if head_dim % 2:
        raise CheckpointError(f"{fields.where}: head_dim {head_dim} is odd, so it cannot be rotated in pairs.")
    return {
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "qkv_bias": attention_bias or family == "qwen2",
        "output_bias": attention_bias and family != "qwen2",
        "mlp_bias": family == "llama" and fields.boolean("mlp_bias", default=False),
        "qk_norm": family == "qwen3",
    }


def _deepseek(fields: Fields, family: str, num_heads: int, attention_bias: bool) -> dict[str, Any]:
    rope_dim = fields.integer("qk_rope_head_dim", 2, _MAX_WIDTH, default=64)
    if rope_dim % 2:
        raise CheckpointError(f"{fields.where}: qk_rope_head_dim {rope_dim} is odd, so it cannot be rotated in pairs.")
    latent = LatentConfig(
        q_lora_rank=fields.optional_integer("q_lora_rank", 1, _MAX_WIDTH),
        kv_lora_rank=fields.integer("kv_lora_rank", 1, _MAX_WIDTH),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", 1, _MAX_WIDTH),
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.integer("v_head_dim", 1, _MAX_WIDTH),
        interleaved=fields.boolean("rope_interleave", default=True),
    )
    return {
        "num_kv_heads": num_heads,
        "head_dim": latent.qk_nope_head_dim + rope_dim,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": family == "deepseek_v2" and fields.boolean("mlp_bias", default=False),
        "qk_norm": False,
        "num_mtp_layers": fields.integer("num_nextn_predict_layers", 0, 16, default=0),
        "latent": latent,
        "experts": _experts(fields, family),
    }


def _experts(fields: Fields, family: str) -> ExpertsConfig | None:
    num_experts = fields.optional_integer("n_routed_experts", 1, 2**16)
    if num_experts is None:
        return None
    if fields.integer("moe_layer_freq", 1, 1024, default=1) != 1:
        raise UnsupportedModelError(f"{fields.where}: moe_layer_freq other than 1 is not supported.")
    num_groups = fields.optional_integer("n_group", 1, num_experts) or 1
    num_chosen_groups = fields.optional_integer("topk_group", 1, num_groups) or num_groups
    normalize = fields.boolean("norm_topk_prob", default=family == "deepseek_v3")
    default_method = "greedy" if family == "deepseek_v2" else "noaux_tc"
    method = fields.text("topk_method", default_method)
    if family == "deepseek_v2":
        if method == "greedy":
            num_groups = num_chosen_groups = 1
        if method not in ("greedy", "group_limited_greedy") or normalize:
            raise UnsupportedModelError(
                f"{fields.where}: router topk_method {method!r} with norm_topk_prob {normalize} is not supported."
            )
    elif method != "noaux_tc" or fields.text("scoring_func", "sigmoid") != "sigmoid":
        raise UnsupportedModelError(f"{fields.where}: router {method!r} is not supported for deepseek_v3.")
    if num_experts % num_groups:
        raise CheckpointError(f"{fields.where}: {num_experts} experts do not divide into {num_groups} groups.")
    per_group = num_experts // num_groups
    num_chosen = fields.integer("num_experts_per_tok", 1, per_group * num_chosen_groups)
    if family == "deepseek_v3" and num_chosen_groups < num_groups and per_group < 2:
        raise CheckpointError(f"{fields.where}: groups of one expert cannot be ranked by their two best.")
    return ExpertsConfig(
        router="softmax" if family == "deepseek_v2" else "sigmoid",
        num_experts=num_experts,
        num_chosen=num_chosen,
        num_shared=fields.optional_integer("n_shared_experts", 0, 1024) or 0,
        intermediate_size=fields.integer("moe_intermediate_size", 1, _MAX_WIDTH),
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        normalize=normalize,
        scale=fields.number("routed_scaling_factor", 0.0, 1e6, default=1.0),
        num_dense_layers=fields.integer("first_k_dense_replace", 0, _MAX_LAYERS, default=0),
    )


def _rope(fields: Fields, max_position: int) -> RopeConfig:
    new = fields.table("rope_parameters")
    scaling = new or fields.table("rope_scaling")
    source = new if new and "rope_theta" in new.raw else fields
    theta = source.number("rope_theta", 1.0, 1e12, default=10000.0)
    if not scaling:
        return RopeConfig(theta=theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=scaling.number("factor", 1.0, 1e6))
    original = scaling.integer("original_max_position_embeddings", 1, _MAX_CONTEXT, default=max_position)
    if kind == "llama3":
        low = scaling.number("low_freq_factor", 1e-3, 1e6)
        high = scaling.number("high_freq_factor", 1e-3, 1e6)
        if low >= high:
            raise CheckpointError(f"{fields.where}: rope low_freq_factor {low} is not below high_freq_factor {high}.")
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=scaling.number("factor", 1.0, 1e6),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if kind == "yarn":
        return _yarn(scaling, theta, original, max_position)
    raise UnsupportedModelError(
        f"{fields.where}: rotary scaling {kind!r} is not supported.",
        hint="Supported: default, linear, yarn, llama3.",
    )


def _yarn(scaling: Fields, theta: float, original: int, max_position: int) -> RopeConfig:
    beta_fast = scaling.number("beta_fast", 1e-3, 1e6, default=32.0)
    beta_slow = scaling.number("beta_slow", 1e-3, 1e6, default=1.0)
    if beta_fast < beta_slow:
        raise CheckpointError(f"{scaling.where}: beta_fast {beta_fast:g} is below beta_slow {beta_slow:g}.")
    # Outside these, no rotated pair lies between the two betas: the blend's range is empty or inverted.
    turns = original / (2 * math.pi)  # of the fastest pair over the trained context; the slowest makes turns / theta
    if turns <= beta_slow:
        raise CheckpointError(
            f"{scaling.where}: original_max_position_embeddings {original} is too small for beta_slow {beta_slow:g}."
        )
    if theta <= 1.0 or turns / theta >= beta_fast:
        raise CheckpointError(
            f"{scaling.where}: rope_theta {theta:g} is too small for yarn with "
            f"original_max_position_embeddings {original}."
        )
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=scaling.number("factor", 1.0, 1e6, default=max(max_position / original, 1.0)),
        original_max_position=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        mscale=scaling.number("mscale", 0.0, 100.0, default=0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0, 100.0, default=0.0),
        attention_factor=scaling.optional_number("attention_factor", 0.0, 100.0),
        truncate=scaling.boolean("truncate", default=True),
    )


def _dtype(fields: Fields) -> Literal["bfloat16", "float16", "float32"]:
    name = fields.text("dtype", fields.text("torch_dtype", "bfloat16")).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        return "bfloat16"
    if name == "float16":
        return "float16"
    if name == "float32":
        return "float32"
    raise UnsupportedModelError(f"{fields.where}: dtype {name!r} is not supported.")
