"""NF4: weights in 4 bits for QLoRA (Dettmers et al., arXiv 2305.14314), in plain torch, on any device.

Blocks of 64 values share their largest magnitude; each value is the nearest of 16 levels, which are equally likely for
normally distributed weights (appendix E of the paper). The blocks' magnitudes are rounded in turn, to 8 bits between
the least and the largest of 256 blocks (section 3's double quantization, with evenly spaced levels): 4.13 bits per
weight in all. Products dequantize the matrix to the activations' type, forward and again backward, so that nothing of
its size outlives them. Used by `layers`; knows nothing of adapters and networks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
_BLOCKS_PER_GROUP = 256
_MOST = 255
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Nf4(nn.Module):
    """A matrix `[N, C]`, or a stack `[E, N, C]` whose matrices are dequantized one by one, in 4 bits.

    Buffers, by matrix: `codes`, two values per byte, the first in the high half; `magnitudes`, 8 bits per block;
    `least` and `step`, per group of blocks, what these stand for.
    """

    codes: Tensor
    magnitudes: Tensor
    least: Tensor
    step: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape[-2:])
        matrices = weight.detach().reshape(-1, *self.shape)
        parts = [_quantize(matrix) for matrix in matrices]
        for name, values in zip(("codes", "magnitudes", "least", "step"), zip(*parts, strict=True), strict=True):
            self.register_buffer(name, torch.stack(values), persistent=False)

    def dequantize(self, dtype: torch.dtype, index: int = 0) -> Tensor:
        """One matrix `[N, C]`."""
        rows, columns = self.shape
        codes = self.codes[index]
        counts = self.magnitudes[index].float()
        step, least = (t[index].repeat_interleave(_BLOCKS_PER_GROUP)[: len(counts)] for t in (self.step, self.least))
        magnitudes = (counts * step + least).unsqueeze(1)
        out = torch.empty(magnitudes.shape[0], BLOCK, dtype=dtype, device=codes.device)
        pairs, at_once = _pairs(codes.device), _at_once(codes.device)
        for start in range(0, out.shape[0], at_once):
            blocks = slice(start, start + at_once)
            values = nn.functional.embedding(codes[start * BLOCK // 2 : (start + at_once) * BLOCK // 2].int(), pairs)
            torch.mul(values.view(-1, BLOCK), magnitudes[blocks], out=out[blocks])
        return out.flatten()[: rows * columns].view(rows, columns)

    def multiply(self, x: Tensor) -> Tensor:
        """`x W^T [T, N]` for `x [T, C]`."""
        out: Tensor = _Product.apply(x, self)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Nf4) -> Tensor:
        ctx.weight = weight
        return x @ weight.dequantize(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.weight.dequantize(grad.dtype), None


def _at_once(device: torch.device) -> int:
    """How many blocks are worked on at once: what passes through a processor's cache, or keeps a GPU busy."""
    return 2**11 if device.type == "cpu" else 2**18


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Both values that a byte stands for, fp32 `[256, 2]`."""
    levels = torch.tensor(LEVELS, device=device)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)


def _quantize(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_blocks = -(-matrix.numel() // BLOCK)
    largest = matrix.new_empty(num_blocks, dtype=torch.float32)
    codes = matrix.new_empty(num_blocks * BLOCK // 2, dtype=torch.uint8)
    levels = torch.tensor(LEVELS, device=matrix.device)
    middles = (levels[1:] + levels[:-1]) / 2
    flat = matrix.flatten()
    at_once = BLOCK * _at_once(matrix.device)
    for start in range(0, flat.numel(), at_once):
        values = flat[start : start + at_once].float()
        values = nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        magnitudes = values.abs().amax(dim=1)
        scaled = values / magnitudes.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        nearest = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).view(-1, 2)
        largest[start // BLOCK : start // BLOCK + magnitudes.shape[0]] = magnitudes
        codes[start // 2 : start // 2 + nearest.shape[0]] = nearest[:, 0] * 16 + nearest[:, 1]
    missing = -num_blocks % _BLOCKS_PER_GROUP
    groups = torch.cat((largest, largest[-1:].expand(missing))).view(-1, _BLOCKS_PER_GROUP)
    least, most = groups.aminmax(dim=1)
    step = (most - least) / _MOST
    counted = (groups - least.unsqueeze(1)) / step.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    return codes, counted.round().flatten()[:num_blocks].to(torch.uint8), least, step
