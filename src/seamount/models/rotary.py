"""Rotary angles for a batch of positions, with the scalings that real checkpoints use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import RopeConfig


class Rotary:
    """Turns positions into cosines and sines; made once per model, used once per step for all layers.

    Args:
        config: base and scaling.
        dim: rotated columns per head.
    """

    def __init__(self, config: RopeConfig, dim: int) -> None:
        self._frequencies = _frequencies(config, dim)
        self._magnitude = _magnitude(config)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return `cos, sin`, each `[T, dim/2]` in fp32, for integer `positions [T]`."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = positions.float().unsqueeze(1) * self._frequencies
        return angles.cos() * self._magnitude, angles.sin() * self._magnitude


def softmax_scale(config: RopeConfig, head_dim: int) -> float:
    """The factor on attention scores in latent attention: 1/sqrt(d), times mscale^2 under YaRN (DeepSeek-V2)."""
    scale = head_dim**-0.5
    if config.kind == "yarn" and config.mscale_all_dim:
        scale *= _yarn_mscale(config.factor, config.mscale_all_dim) ** 2
    return scale


def _frequencies(config: RopeConfig, dim: int) -> Tensor:
    plain = 1.0 / (config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, plain, dim)
    return plain


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    wavelengths = 2 * math.pi / plain
    turns = config.original_max_position / wavelengths
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / config.factor + blend * plain


def _yarn(config: RopeConfig, plain: Tensor, dim: int) -> Tensor:
    """Blend of kept and interpolated frequencies by how often a dimension turns (arXiv 2309.00071, section 3.2)."""

    def column(turns: float) -> float:
        span = config.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(config.theta))

    low, high = column(config.beta_fast), column(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return plain / config.factor * ramp + plain * (1 - ramp)


def _magnitude(config: RopeConfig) -> float:
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _yarn_mscale(config.factor, config.mscale) / _yarn_mscale(config.factor, config.mscale_all_dim)
    return _yarn_mscale(config.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
