"""From settings to a running engine: find the checkpoint, plan memory, load weights, allocate the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from seamount import kernels
from seamount.core.requests import ModelFacts
from seamount.core.settings import EngineConfig
from seamount.kernels import can_capture
from seamount.kernels.hardware import choose_device, default_threads
from seamount.models.adapter import Adapter
from seamount.models.config import ModelConfig
from seamount.models.footprint import cache_bytes_per_token, num_active_parameters, num_parameters
from seamount.models.loading import choose_precision, load_planned, plan_load, planned_bytes, resident_bytes
from seamount.models.locate import locate_model, model_name
from seamount.models.memory import available_bytes
from seamount.models.pooling_config import read_pooling
from seamount.models.prompt import PromptEncoder

from .blocks import BlockPool
from .engine import EngineCore
from .memory import plan_memory
from .payoff import Payoff
from .runner import Runner
from .scheduler import Scheduler
from .speculative import Speculation

Progress = Callable[[str, int, int], None]


def build_engine(config: EngineConfig, on_progress: Progress | None = None) -> tuple[EngineCore, PromptEncoder]:
    """Load the model that `config` names and return an engine that is ready to step.

    Args:
        on_progress: called with the stage's name, bytes done and bytes in all; a remark has none.

    Raises:
        NotFoundError: there is no such model.
        CheckpointError: the folder cannot be used.
        OutOfMemoryError: weights or the asked-for context do not fit.
    """
    started = time.monotonic()
    folder = locate_model(config.model)
    # Headers are compared with the config before anything is planned from it; what converters dropped is known then.
    load_plan = plan_load(folder, ModelConfig.from_folder(folder))
    if config.adapter is not None:
        load_plan = load_plan.with_adapter(Adapter.from_folder(config.adapter.expanduser()))
    encoder = PromptEncoder.from_folder(folder)
    device = choose_device(config.device)
    num_threads = config.num_threads or default_threads()
    compiled = device.type == "cpu" and kernels.library() is not None
    if compiled:
        kernels.set_threads(num_threads)
    # Beside the compiled kernels torch does small things only, and its threads, which keep spinning for milliseconds
    # after each, would take the processors from theirs.
    torch.set_num_threads(1 if compiled else num_threads)
    if not guesses(config, compiled=compiled):
        load_plan = load_plan.without_mtp()
    model_config = load_plan.config
    dtype_name = model_config.dtype if config.dtype == "auto" else config.dtype
    dtype: torch.dtype = getattr(torch, dtype_name)
    precision = choose_precision(load_plan, dtype, config.quantization, device)
    plan = plan_memory(model_config, config, dtype, planned_bytes(load_plan, precision), available_bytes(device))
    embedding = read_pooling(folder, model_config, max_tokens=plan.max_model_len)

    if on_progress is not None:
        if device.type == "cpu" and not compiled:
            slower = "several times slower than compiled kernels, and equal bytes are not promised"
            on_progress(f"kernels: {kernels.describe(device)}; {slower}", 0, 0)
        if load_plan.adapter is not None:
            on_progress(f"adapter {load_plan.adapter}", 0, 0)
        on_progress(str(plan), 0, 0)

    def loading(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress("weights", done, total)

    model = load_planned(load_plan, precision, device=device, progress=loading)
    runner = Runner(model, num_blocks=plan.num_blocks, block_size=plan.block_size, dtype=dtype, device=device)
    scheduler = Scheduler(
        BlockPool(plan.num_blocks, plan.block_size),
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens,
        enable_prefix_cache=config.enable_prefix_cache,
    )
    facts = ModelFacts(
        name=model_name(folder),
        family=model_config.family,
        num_parameters=num_parameters(model_config),
        num_active_parameters=num_active_parameters(model_config),
        dtype=dtype_name,
        device=str(device),
        vocab_size=model_config.vocab_size,
        max_model_len=plan.max_model_len,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        cache_bytes_per_token=cache_bytes_per_token(model_config, dtype),
        weight_bytes=resident_bytes(model),
        load_s=time.monotonic() - started,
        worker_pid=os.getpid(),
        max_num_seqs=config.max_num_seqs,
        embedding=embedding,
        generates=model_config.has_head,
    )
    longest = -(-plan.max_model_len // plan.block_size)
    if model.is_packed and model_config.has_head:
        runner.record(max_blocks=longest)
    speculation = None
    if model.mtp:
        speculation = Speculation(
            model,
            runner.cache,
            block_size=plan.block_size,
            device=device,
            eos_token_ids=encoder.eos_token_ids,
            payoff=Payoff() if config.speculation == "auto" else None,
            replay=runner.replay,
        )
    elif can_capture(device):
        runner.capture(max_num_seqs=config.max_num_seqs, max_blocks=longest)
    return EngineCore(runner, scheduler, encoder, facts, speculation), encoder


def guesses(config: EngineConfig, *, compiled: bool) -> bool:
    """Whether the MTP block is used: where it decides for itself, only in the compiled kernels, in which a guess cannot
    change a bit.
    """
    return config.speculation == "mtp" or (config.speculation == "auto" and compiled)
