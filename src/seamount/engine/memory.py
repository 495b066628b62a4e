"""How much memory a model will take here, decided before any of it is spent.

Pure arithmetic over facts: the caller measures what is free (`models.memory`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seamount.core.errors import ConfigError, OutOfMemoryError
from seamount.core.settings import EngineConfig
from seamount.core.sizes import size_text
from seamount.models.config import ModelConfig
from seamount.models.footprint import cache_bytes_per_token, workspace_bytes

# Of what is left after weights and workspace, the part that the cache may take unasked.
_CACHE_SHARE = 0.6
# Unasked, the cache holds the longest context, or this many tokens per sequence that may run, whichever is more.
_TOKENS_PER_SEQUENCE = 1024
_SMALLEST_CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What will be allocated, beside what the process holds when the plan is made.

    Attributes:
        weight_bytes: the loaded weights.
        cache_bytes: the paged cache, `num_blocks` blocks of `block_size` tokens.
        workspace_bytes: all else, when the largest step runs.
        free_bytes: what the machine had when the plan was made.
        max_model_len: tokens of prompt plus output that will be accepted.
        declared_model_len: what the checkpoint declares.
    """

    weight_bytes: int
    cache_bytes: int
    workspace_bytes: int
    free_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    declared_model_len: int

    def __str__(self) -> str:
        tokens = self.num_blocks * self.block_size
        return (
            f"memory plan: weights {size_text(self.weight_bytes)}, cache up to {size_text(self.cache_bytes)} "
            f"({tokens:,} tokens), workspace {size_text(self.workspace_bytes)}; {size_text(self.free_bytes)} is free"
        )


def plan_memory(
    model: ModelConfig, config: EngineConfig, dtype: torch.dtype, weight_bytes: int, free_bytes: int
) -> MemoryPlan:
    """Choose the context length and the size of the cache.

    Args:
        dtype: precision of the cache.
        weight_bytes: memory of the loaded weights (`models.loading.planned_bytes`).
        free_bytes: memory that may be used.

    Raises:
        ConfigError: the asked-for context is longer than the checkpoint's.
        OutOfMemoryError: what was asked for does not fit; the hint says what would.
    """
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the checkpoint declares {model.max_position} tokens.",
            hint=f"Use at most {model.max_position}.",
        )
    block_bytes = cache_bytes_per_token(model, dtype) * config.block_size
    workspace = workspace_bytes(model, step_tokens=config.max_step_tokens, num_sequences=config.max_num_seqs)
    spare = free_bytes - weight_bytes - workspace
    if spare < block_bytes:
        raise OutOfMemoryError(
            f"The weights need {size_text(weight_bytes)} and {size_text(workspace)} of working space; "
            f"{size_text(free_bytes)} of memory is free.",
            hint="Free memory, or choose a smaller model, a smaller dtype, or quantization int8 or int4.",
        )
    wanted_len = config.max_model_len or model.max_position
    if config.cache_memory_bytes is not None:
        room = config.cache_memory_bytes
        if room > spare:
            raise OutOfMemoryError(
                f"cache_memory_bytes is {size_text(room)}; {size_text(max(spare, 0))} is free beside the weights.",
                hint=f"Use at most {spare} bytes.",
            )
    else:
        tokens = max(wanted_len, config.max_num_seqs * _TOKENS_PER_SEQUENCE)
        room = min(int(spare * _CACHE_SHARE), _blocks(tokens, config.block_size) * block_bytes)
    num_blocks = room // block_bytes
    capacity = num_blocks * config.block_size
    if capacity < wanted_len and (config.max_model_len is not None or capacity < min(_SMALLEST_CONTEXT, wanted_len)):
        raise OutOfMemoryError(
            f"A context of {wanted_len} tokens needs "
            f"{size_text(_blocks(wanted_len, config.block_size) * block_bytes)} of cache; "
            f"{size_text(room)} can be given to it.",
            hint=f"A max_model_len of at most {capacity} fits.",
        )
    return MemoryPlan(
        weight_bytes=weight_bytes,
        cache_bytes=num_blocks * block_bytes,
        workspace_bytes=workspace,
        free_bytes=free_bytes,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=min(wanted_len, capacity),
        declared_model_len=model.max_position,
    )


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
