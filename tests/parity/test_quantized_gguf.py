"""Checkpoints written by transformers, converted to GGUF, come back: the same config, and the same or nearly the
same tensors.

The converter below follows the format's published conventions and is independent of the reader: it uses the `gguf`
package to name, quantize and write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from seamount import kernels
from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.config import ModelConfig
from seamount.models.gguf import Gguf
from seamount.models.gguf_config import hf_config
from seamount.models.gguf_keymap import GgufEntry, gguf_entries
from seamount.models.gguf_reading import read_rows
from seamount.models.keymap import placements
from seamount.models.loading import load_model
from seamount.models.network import CausalLM
from seamount.models.quantized import GroupQuantized

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
DENSE = SMALL | {"num_key_value_heads": 2}
LATENT = SMALL | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}
V3 = LATENT | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0}
V2 = LATENT | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


def rope(kind: str, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0} | more}


YARN = {"original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0}
LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, DENSE | {"tie_word_embeddings": False}),
    "qwen2-tied-yarn": (Qwen2Config, DENSE | {"tie_word_embeddings": True} | rope("yarn", **YARN)),
    "qwen3": (Qwen3Config, DENSE | {"head_dim": 32}),
    "qwen3-bias": (Qwen3Config, DENSE | {"head_dim": 32, "attention_bias": True}),
    "llama": (LlamaConfig, DENSE),
    "llama3": (LlamaConfig, DENSE | rope("llama3", **LLAMA3, rope_theta=500000.0)),
    "llama-linear-biases": (LlamaConfig, DENSE | {"attention_bias": True, "mlp_bias": True} | rope("linear")),
    "v2-lite": (
        DeepseekV2Config,
        V2 | {"q_lora_rank": None} | rope("yarn", mscale=0.707, mscale_all_dim=0.707, **YARN),
    ),
    "v2": (DeepseekV2Config, V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "v3": (DeepseekV3Config, V3 | rope("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN)),
}
ARCHITECTURES = {"deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}


def convert(
    folder: Path,
    path: Path,
    kind: Kind = Kind.F32,
    *,
    old_deepseek: bool = False,
    tokenizer: bool = False,
    **fields: Any,
) -> None:
    """Write a GGUF file of a checkpoint folder; `fields` are more metadata, `old_deepseek` one kv_b tensor."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    write_fields(writer, config, architecture, old=old_deepseek)
    if tokenizer:
        vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        vocab["fi"] = vocab.pop("filler0")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(vocab, key=vocab.get))
        writer.add_token_merges(["f i"])
        writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}!")
    for name, value in fields.items():
        writer.add_uint32(f"{architecture}.{name.replace('__', '.')}", value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"])
    for name, value in arranged(tensors, config, old=old_deepseek):
        stem, ending = name.rsplit(".", 1)
        known = names.get_name(stem)
        assert known is not None, name
        add_tensor(writer, f"{known}.{ending}", value.numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    if values.ndim == 1 or "ffn_gate_inp" in name or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F32
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def write_fields(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str, *, old: bool) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(0)
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    if config.get("eos_token_id") is not None:
        writer.add_eos_token_id(config["eos_token_id"])
    parameters = config["rope_parameters"]
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(parameters["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(parameters["beta_slow"])
        if "mscale_all_dim" in parameters:
            writer.add_rope_scaling_yarn_log_mul(0.1 * parameters["mscale_all_dim"])
    if parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(parameters, config["hidden_size"] // 4))
    if architecture != "deepseek2":
        writer.add_head_count_kv(config["num_key_value_heads"])
        if config.get("head_dim"):
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
        if architecture == "llama":
            writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        return
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    key_length = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if old:
        writer.add_head_count_kv(config["num_attention_heads"])
        writer.add_key_length(key_length)
        writer.add_value_length(config["v_head_dim"])
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(key_length)
        writer.add_value_length_mla(config["v_head_dim"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if config["model_type"] == "deepseek_v3":
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def llama3_factors(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """By Meta's definition, one frequency at a time."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * parameters["rope_theta"] ** (i / head_dim)
        context = parameters["original_max_position_embeddings"]
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(parameters["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return np.array(found, np.float32)


def arranged(tensors: dict[str, torch.Tensor], config: dict[str, Any], *, old: bool) -> list[tuple[str, torch.Tensor]]:
    """Tensors as the format wants them: experts stacked, llama's heads rotated, keys and values apart."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    for name in sorted(tensors, key=lambda name: [int(p) if p.isdigit() else -1 for p in name.split(".")]):
        value, part = tensors[name], name.split(".")[-2]
        if ".experts." in name and "shared" not in name:
            experts.setdefault(name.split(".experts.")[0] + f".experts.{part}.weight", []).append(value)
        elif config["model_type"] == "llama" and part in heads:
            per_head = value.reshape(heads[part], 2, -1, *value.shape[1:])
            found[name] = per_head.transpose(1, 2).reshape(value.shape)
        elif part == "kv_b_proj" and not old:
            per_head = value.view(config["num_attention_heads"], -1, value.shape[1])
            keys, values = per_head.split([config["qk_nope_head_dim"], config["v_head_dim"]], 1)
            found[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2)
            found[name.replace("kv_b_proj", "v_b_proj")] = values
        elif name.endswith("e_score_correction_bias"):
            found[name.replace("_bias", ".bias")] = value
        else:
            found[name] = value
    return [*found.items(), *((name, torch.stack(values)) for name, values in experts.items())]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, write_checkpoint: Callable[..., Any]) -> Path:
    kind, arguments = CASES[request.param]
    folder: Path = write_checkpoint(kind(**arguments), seed=3)[0]
    return folder


def opened(path: Path) -> tuple[ModelConfig, dict[str, GgufEntry]]:
    file = Gguf.from_file(path)
    raw = hf_config(file)
    return ModelConfig.from_dict(raw), gguf_entries(file, raw)


def test_config_and_tensors_come_back(case: Path, tmp_path: Path) -> None:
    convert(case, tmp_path / "model.gguf")
    config, entries = opened(tmp_path / "model.gguf")
    assert config == ModelConfig.from_folder(case)
    original = load_file(case / "model.safetensors")
    assert {place.key: place.shape for place in placements(config)} == {k: e.shape for k, e in entries.items()}
    for key, entry in entries.items():
        found = read_rows(entry)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, original[key]), key


@pytest.mark.parametrize("name", ["llama3", "v3"])
def test_rows_come_in_strips(name: str, write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    kind, arguments = CASES[name]
    convert(write_checkpoint(kind(**arguments))[0], tmp_path / "model.gguf", Kind.Q4_0)
    for entry in opened(tmp_path / "model.gguf")[1].values():
        strips = [read_rows(entry, i, i + entry.row_step) for i in range(0, entry.shape[0], entry.row_step)]
        joined = torch.cat([s.dequantize() if isinstance(s, GroupQuantized) else s for s in strips])
        whole = read_rows(entry)
        assert torch.equal(joined, whole.dequantize() if isinstance(whole, GroupQuantized) else whole)
        if entry.row_step > 1:
            with pytest.raises(ValueError, match="none of them"):
                read_rows(entry, 0, 1)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(Kind.F16, 1e-3), (Kind.BF16, 8e-3), (Kind.Q8_0, 2e-2), (Kind.Q4_0, 0.2), (Kind.Q4_1, 0.2), (Kind.Q5_0, 0.1)],
)
@pytest.mark.parametrize("name", ["llama", "v2-lite"])
def test_quantized_tensors_are_near(
    name: str, kind: Kind, tolerance: float, write_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """Rows are still in their places: a wrong order would be off by far more than any of these types."""
    reference, arguments = CASES[name]
    folder = write_checkpoint(reference(**arguments), seed=4)[0]
    convert(folder, tmp_path / "model.gguf", kind)
    original = load_file(folder / "model.safetensors")
    num_grouped = 0
    for key, entry in opened(tmp_path / "model.gguf")[1].items():
        found = read_rows(entry)
        num_grouped += isinstance(found, GroupQuantized)
        values = found.dequantize() if isinstance(found, GroupQuantized) else found
        assert (values - original[key]).norm() <= tolerance * original[key].norm(), key
    assert (num_grouped > 10) == (kind in (Kind.Q4_0, Kind.Q4_1))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1])
def test_transformers_reads_the_same_weights(
    name: str, kind: Kind, write_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """The converter above is right about the format: its files mean the same to another reader."""
    reference, arguments = CASES[name]
    folder, model = write_checkpoint(reference(**arguments), seed=5)
    convert(folder, tmp_path / "model.gguf", kind)
    theirs = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=model)["tensors"]
    entries = opened(tmp_path / "model.gguf")[1]
    assert set(entries) == set(theirs)
    for key, entry in entries.items():
        found = read_rows(entry)
        values = found.dequantize() if isinstance(found, GroupQuantized) else found
        torch.testing.assert_close(values, theirs[key], rtol=1e-5, atol=1e-6)


def test_old_deepseek_files_with_one_expanding_matrix(write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    reference, arguments = CASES["v2-lite"]
    folder = write_checkpoint(reference(**arguments))[0]
    convert(folder, tmp_path / "model.gguf", old_deepseek=True)
    config, entries = opened(tmp_path / "model.gguf")
    assert config == ModelConfig.from_folder(folder)
    key = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(read_rows(entries[key]), load_file(folder / "model.safetensors")[key])  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "place"), [(Kind.Q8_0, 0), (Kind.Q4_0, 0), (Kind.Q4_1, 2), (Kind.F32, 2)])
def test_weights_that_are_no_numbers_are_refused(
    kind: Kind, place: int, write_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    convert(write_checkpoint(LlamaConfig(**DENSE))[0], tmp_path / "model.gguf", kind)
    entry = opened(tmp_path / "model.gguf")[1]["model.layers.0.mlp.up_proj.weight"]
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    at = entry.parts[0].offset + place
    data[at : at + 2] = b"\x00\x7c" if kind is not Kind.F32 else b"\x80\x7f"  # infinity
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="no numbers"):
        read_rows(entry)


def test_layers_for_multi_token_prediction_are_left_out(write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    reference, arguments = CASES["v3"]
    convert(write_checkpoint(reference(**arguments))[0], tmp_path / "model.gguf", nextn_predict_layers=1)
    config, entries = opened(tmp_path / "model.gguf")
    assert (config.num_layers, config.num_mtp_layers) == (1, 0)
    assert not [key for key in entries if key.startswith("model.layers.1.")]


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("expert_count", 8, "experts"),
        ("attention__sliding_window", 16, "sliding"),
        ("rope__dimension_sections", 4, "dimension_sections"),
        ("attention__key_length", 8, "rotated"),
    ],
)
def test_variations_that_are_not_run_are_refused(
    field: str, value: int, problem: str, write_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    reference, arguments = CASES["llama"]
    folder = write_checkpoint(reference(**arguments))[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": None}))
    convert(folder, tmp_path / "model.gguf", **{field: value})
    with pytest.raises(UnsupportedModelError, match=problem):
        opened(tmp_path / "model.gguf")


def test_unknown_frequency_factors_are_refused(write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    other = rope("llama3", **LLAMA3 | {"original_max_position_embeddings": 1000}, rope_theta=500000.0)
    convert(write_checkpoint(LlamaConfig(**DENSE | other))[0], tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        opened(tmp_path / "model.gguf")


def test_a_tensor_without_a_place_is_refused(write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_checkpoint(LlamaConfig(**DENSE))[0]
    convert(folder, tmp_path / "model.gguf")
    file = Gguf.from_file(tmp_path / "model.gguf")
    stored = file.tensors.pop("blk.0.attn_q.weight")
    file.tensors["blk.0.attn_sinks.weight"] = stored
    with pytest.raises(CheckpointError, match="no supported network"):
        gguf_entries(file, hf_config(file))


def loaded(path: Path, quantization: Any = "auto", *, packed: bool = True) -> CausalLM:
    config = ModelConfig.from_folder(path)
    return load_model(
        path, config, dtype=torch.float32, device=torch.device("cpu"), quantization=quantization, packed=packed
    )


def dequantized(folder: Path, path: Path) -> Path:
    """The checkpoint folder, its tensors replaced by what the GGUF file holds."""
    found = {}
    for key, entry in opened(path)[1].items():
        value = read_rows(entry)
        found[key] = value.dequantize() if isinstance(value, GroupQuantized) else value
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(kernels.library() is None, reason="no compiled kernels")
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0])
@pytest.mark.parametrize("name", ["qwen2-tied-yarn", "llama", "v3"])
def test_a_file_answers_as_its_blocks_say(
    name: str, kind: Kind, write_checkpoint: Any, tmp_path: Path, paged_driver: Any
) -> None:
    reference, arguments = CASES[name]
    folder = write_checkpoint(reference(**arguments), seed=6)[0]
    path = tmp_path / "model.gguf"
    convert(folder, path, kind)
    plain = loaded(dequantized(folder, path), packed=False)
    sequences = [[5, 9, 90, 3, 44, 17, 8], [1, 2, 3]]
    expected = torch.cat(paged_driver(plain).all_logits(sequences))

    def distance(model: CausalLM) -> float:
        logits = torch.cat(paged_driver(model).all_logits(sequences))
        # Of the middle token: one whose router was nearly undecided may take another expert, and be far off.
        return float(((logits - expected).norm(dim=1) / expected.std(dim=1).mul(97**0.5)).median())

    model = loaded(path)
    kinds = {Kind.F16: "float32", Kind.Q4_0: "int4", Kind.Q4_1: "int4"}
    down = model.layers[0].mlp.down_proj.packed
    assert down is not None
    assert down.kind == kinds.get(kind, "int8")
    assert distance(model) < (1e-4 if kind is Kind.F16 else 0.08)
    assert distance(loaded(path, "none")) < 1e-4
    for (parameter, mine), other in zip(loaded(path, packed=False).named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other), parameter


def test_a_file_is_a_model(write_checkpoint: Any, tmp_path: Path) -> None:
    """By its own path and by its folder: tokenizer, template and weights are in it."""
    from seamount import LLM, SamplingParams

    folder = write_checkpoint(Qwen2Config(**(DENSE | {"tie_word_embeddings": False, "vocab_size": 307})))[0]
    (tmp_path / "only").mkdir()
    path = tmp_path / "only" / "small.gguf"
    convert(folder, path, Kind.Q8_0, tokenizer=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    answers = []
    for model in (str(path), str(path.parent)):
        llm = LLM(model=model, num_threads=1, cache_memory_bytes=2**21)
        assert llm.facts.name == "small"
        answers.append(
            [llm.generate(["hello"], greedy)[0], llm.chat([{"role": "user", "content": "hello"}], greedy)[0]]
        )
    (plain, chat), again = answers
    assert chat.prompt_token_ids[:-1] == plain.prompt_token_ids  # the template adds "!"
    assert len(plain.token_ids) == 8
    assert [a.token_ids for a in again] == [plain.token_ids, chat.token_ids]


def test_what_a_file_lacks_is_said(write_checkpoint: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(LlamaConfig(**DENSE))[0]
    tensors = load_file(folder / "model.safetensors")
    short = {name: value for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(short, folder / "model.safetensors")
    convert(folder, tmp_path / "short.gguf")
    with pytest.raises(CheckpointError, match=r"short\.gguf lacks .*layers\.1\.mlp\.up_proj"):
        loaded(tmp_path / "short.gguf")
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": torch.zeros(32, 64)}, folder / "model.safetensors")
    convert(folder, tmp_path / "small.gguf")
    with pytest.raises(CheckpointError, match="shape"):
        loaded(tmp_path / "small.gguf")
    data = (tmp_path / "small.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated|ends"):
        loaded(tmp_path / "cut.gguf")
