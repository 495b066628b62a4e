"""What a checkpoint is and how it would run here, told before any weight is read.

Called by `seamount inspect`. Everything comes from headers, small files and the machine, through the same functions
that the engine starts with, so that the report and the start cannot disagree.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from seamount import kernels
from seamount.core.errors import ConfigError, OutOfMemoryError, RequestError
from seamount.core.settings import DTypeName, EngineConfig, QuantizationName
from seamount.core.sizes import size_text
from seamount.engine.memory import plan_memory
from seamount.kernels import hardware
from seamount.models.config import ModelConfig
from seamount.models.footprint import cache_bytes_per_token, num_active_parameters, num_parameters
from seamount.models.keymap import Placement
from seamount.models.loading import LoadPlan, choose_precision, plan_load, planned_bytes
from seamount.models.memory import available_bytes
from seamount.models.pooling_config import read_pooling
from seamount.models.precision import EMBEDDING, Precision
from seamount.models.prompt import PromptEncoder

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_SWITCHES = ("thinking", "enable_thinking")
_FAST_HALF = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A checkpoint, and this machine's answer to it.

    Attributes:
        num_parameters, num_active_parameters: total, and used per token; without MTP blocks.
        num_mtp_layers, num_mtp_parameters: multi-token-prediction blocks that the weights hold; not loaded unless the
            setting speculation asks for them, and not counted in weight_bytes and cache_bytes_per_token.
        stored_bytes: bytes on disk by stored type, most first.
        stored_as: the format, and the quantization where there is one.
        weight_bytes: memory of the weights, once loaded.
        declared_context: tokens that the checkpoint declares.
        tokenizer_size: tokens of the tokenizer; 0 when it cannot be used.
        template_source: "checkpoint", "built-in NAME" or "none".
        starts_in_reasoning: answers begin inside `<think>` unless told otherwise.
        thinking_switch: the template's variable that turns reasoning on and off, where there is one.
        embeddings: how it makes embeddings; None where it is not made for them.
        generates: it can continue text.
        dtype, device, num_threads, cpu_features, kernels: what would run it.
        free_bytes: memory that is available on the device.
        fitting_context: tokens of prompt plus output that fit beside the weights; 0 when the model does not fit.
        shortage: what is lacking when the model does not fit.
        warnings: what a reader should know before using it.
    """

    folder: str
    family: str
    num_parameters: int
    num_active_parameters: int
    num_mtp_layers: int
    num_mtp_parameters: int
    stored_bytes: dict[str, int]
    num_files: int
    stored_as: str
    weight_bytes: int
    cache_bytes_per_token: int
    vocab_size: int
    declared_context: int
    tokenizer_size: int
    template_source: str
    starts_in_reasoning: bool
    thinking_switch: str | None
    embeddings: str | None
    generates: bool
    dtype: str
    device: str
    num_threads: int
    cpu_features: tuple[str, ...]
    kernels: str
    free_bytes: int
    fitting_context: int
    shortage: str | None
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether it would start here with the default settings."""
        return self.fitting_context > 0

    def to_json(self) -> str:
        """All fields, and `fits`, as one JSON object."""
        return json.dumps({**dataclasses.asdict(self), "fits": self.fits}, indent=2, ensure_ascii=False)

    def rows(self) -> list[tuple[str, str]]:
        """Name and value, in words, in the order of reading; warnings are not among them."""
        stored = ", ".join(f"{kind} {size_text(count)}" for kind, count in self.stored_bytes.items())
        reasoning = "answers begin with it" if self.starts_in_reasoning else "not begun by the template"
        if self.thinking_switch:
            reasoning += f"; switch: {self.thinking_switch}"
        mtp = str(self.num_mtp_layers)
        if self.num_mtp_layers:
            mtp += f", {_count(self.num_mtp_parameters)} parameters; loaded only for --speculation"
        if self.fits:
            fit = f"yes, up to {self.fitting_context:,} of {self.declared_context:,} tokens of context"
        else:
            fit = f"no: {self.shortage}"
        return [
            ("Folder", self.folder),
            ("Family", self.family),
            ("Parameters", f"{_count(self.num_parameters)}, {_count(self.num_active_parameters)} active per token"),
            ("MTP blocks", mtp),
            ("Format", self.stored_as),
            ("Stored", f"{stored} in {self.num_files} file(s)"),
            ("Context", f"{self.declared_context:,} tokens declared"),
            ("Vocabulary", f"{self.vocab_size:,} rows, {self.tokenizer_size:,} tokens in the tokenizer"),
            ("Chat template", self.template_source),
            ("Reasoning", reasoning),
            ("Embeddings", f"{self.embeddings or 'no'}{'' if self.generates else '; it continues no text'}"),
            ("Runs on", f"{self.device}, {self.dtype}, {self.num_threads} thread(s), {self.kernels}"),
            ("CPU features", " ".join(self.cpu_features) or "unknown"),
            ("Weights", size_text(self.weight_bytes)),
            ("Cache per token", f"{self.cache_bytes_per_token:,} bytes"),
            ("Free memory", size_text(self.free_bytes)),
            ("Fits", fit),
        ]


def inspect_checkpoint(
    folder: Path, *, dtype: DTypeName = "auto", quantization: QuantizationName = "auto", device: str = "auto"
) -> Inspection:
    """Describe the checkpoint in `folder`, or the .gguf file, and how the engine would run it with default settings.

    Args:
        dtype, quantization, device: as the settings of the same names.

    Raises:
        CheckpointError: config or weights are broken or do not belong together.
        ConfigError: there is no such device, or it cannot do what was asked for.
    """
    declared = ModelConfig.from_folder(folder)
    stored = plan_load(folder, declared)
    plan = stored.without_mtp()  # by default it is not loaded
    config = plan.config
    target = hardware.choose_device(device)
    dtype_name = config.dtype if dtype == "auto" else dtype
    kind: torch.dtype = getattr(torch, dtype_name)
    free = available_bytes(target)
    precision = choose_precision(plan, kind, quantization, target)
    weight_bytes = planned_bytes(plan, precision)
    context, shortage = _fit(config, EngineConfig(model=str(folder), dtype=dtype), kind, weight_bytes, free)
    prompts = _Prompts.of(folder)
    features = hardware.cpu_features()
    warnings = [*_folder_warnings(folder, declared, stored), *prompts.warnings]
    if 0 < context < config.max_position:
        warnings.append(f"Memory limits the context to {context:,} of {config.max_position:,} tokens.")
    if target.type == "cpu" and dtype_name != "float32" and features and not _FAST_HALF & set(features):
        warnings.append(
            f"This CPU has no {dtype_name} arithmetic; dtype float32 may be faster and takes twice the memory."
        )
    return Inspection(
        folder=str(folder),
        family=config.family,
        num_parameters=num_parameters(config),
        num_active_parameters=num_active_parameters(config),
        num_mtp_layers=stored.config.num_mtp_layers,
        num_mtp_parameters=num_parameters(stored.config) - num_parameters(config),
        stored_bytes=_stored_bytes(plan),
        num_files=len(plan.checkpoint.files),
        stored_as=_stored_as(plan),
        weight_bytes=weight_bytes,
        cache_bytes_per_token=cache_bytes_per_token(config, kind),
        vocab_size=config.vocab_size,
        declared_context=config.max_position,
        tokenizer_size=prompts.tokenizer_size,
        template_source=prompts.template_source,
        starts_in_reasoning=prompts.starts_in_reasoning,
        thinking_switch=prompts.thinking_switch,
        embeddings=_embeddings(folder, config),
        generates=config.has_head,
        dtype=dtype_name,
        device=str(target),
        num_threads=hardware.default_threads(),
        cpu_features=features,
        kernels=_kernels(plan, precision, target),
        free_bytes=free,
        fitting_context=context,
        shortage=shortage,
        warnings=tuple(warnings),
    )


def _fit(
    config: ModelConfig, settings: EngineConfig, kind: torch.dtype, weight_bytes: int, free: int
) -> tuple[int, str | None]:
    try:
        return plan_memory(config, settings, kind, weight_bytes, free).max_model_len, None
    except OutOfMemoryError as error:
        return 0, str(error)


def _embeddings(folder: Path, config: ModelConfig) -> str | None:
    found = read_pooling(folder, config, max_tokens=config.max_position)
    if found is None:
        return None
    which = {"last": "the last token's hidden state", "first": "the first token's", "mean": "the mean of all tokens"}
    scaled = ", scaled to length 1" if found.normalize else ""
    return f"{which[found.pooling]}{scaled}; {found.num_dimensions:,} numbers, texts up to {found.max_tokens:,} tokens"


def _stored_bytes(plan: LoadPlan) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for stored in plan.checkpoint.tensors.values():
        counts[stored.dtype] += stored.num_bytes
    return dict(counts.most_common())


def _stored_as(plan: LoadPlan) -> str:
    if plan.checkpoint.folder.is_file():
        return "GGUF"
    quantization = plan.config.quantization
    if quantization is None:
        return "safetensors"
    if quantization.format == "fp8":
        return "safetensors, FP8 in 128x128 blocks"
    groups = f"groups of {quantization.group_size}" if quantization.group_size else "a scale per row"
    return f"safetensors, {quantization.format} in {quantization.bits} bits, {groups}"


def _kernels(plan: LoadPlan, precision: Precision, device: torch.device) -> str:
    """What multiplies, and in which kinds matrices would be held, most common first."""
    if not precision.is_packed:
        return kernels.describe(device)
    by_parameter: dict[str, list[Placement]] = {}
    for place in plan.places.values():
        if len(place.shape) > 1 and place.parameter != EMBEDDING:
            by_parameter.setdefault(place.parameter, []).append(place)
    counts: Counter[str] = Counter()
    for parameter, places in by_parameter.items():
        counts[precision.storage_of(parameter, places).kind] += sum(place.num_values for place in places)
    return f"{kernels.describe(device)}, weights as {', '.join(kind for kind, _ in counts.most_common())}"


def _folder_warnings(folder: Path, declared: ModelConfig, plan: LoadPlan) -> list[str]:
    warnings = []
    if declared.num_mtp_layers > plan.config.num_mtp_layers:
        warnings.append("config.json declares a multi-token-prediction block that the weights do not hold.")
    if folder.is_file():
        return warnings
    names = sorted(path.name for path in folder.iterdir())
    code = [name for name in names if name.endswith(".py")]
    if code:
        warnings.append(f"Python files are ignored and never run: {', '.join(code[:3])}.")
    pickled = [name for name in names if Path(name).suffix in _PICKLE_SUFFIXES]
    if pickled:
        warnings.append(f"Pickle files are ignored and never opened: {', '.join(pickled[:3])}.")
    return warnings


@dataclass(frozen=True)
class _Prompts:
    """The prompt side of a folder; where it is broken the report says so and goes on."""

    tokenizer_size: int = 0
    template_source: str = "none"
    starts_in_reasoning: bool = False
    thinking_switch: str | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> _Prompts:
        try:
            encoder = PromptEncoder.from_folder(folder)
        except ConfigError as error:
            return cls(warnings=(f"The tokenizer cannot be used: {error}",))
        try:
            return cls._read(encoder)
        except (ConfigError, RequestError) as error:
            problem = f"The chat template cannot be used: {error}"
            return cls(encoder.vocab_size, encoder.template_source, warnings=(problem,))
        finally:
            encoder.close()

    @classmethod
    def _read(cls, encoder: PromptEncoder) -> _Prompts:
        if not encoder.has_chat_template:
            return cls(encoder.vocab_size, warnings=("There is no chat template: only plain completions work.",))
        messages = [{"role": "user", "content": "?"}]
        starts = encoder.encode_chat(messages).starts_in_reasoning
        switch = next((name for name in _SWITCHES if _switches(encoder, name)), None)
        warnings: tuple[str, ...] = ()
        if encoder.template_source != "checkpoint":
            warnings = (f"The folder has no chat template; the {encoder.template_source} one is used.",)
        return cls(encoder.vocab_size, encoder.template_source, starts, switch, warnings)


def _switches(encoder: PromptEncoder, name: str) -> bool:
    messages = [{"role": "user", "content": "?"}]
    try:
        on, off = (encoder.encode_chat(messages, template_kwargs={name: value}).text for value in (True, False))
    except RequestError:  # the template does not read it
        return False
    return on != off


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)
