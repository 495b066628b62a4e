"""Layers whose weights are frozen, with what tuning adds: low-rank matrices beside the product, weights in 4 bits.

`lora` and `nf4` put them in the place of the network's own, of which they keep the parameters' names. The network fuses
projections that PEFT adapts one by one; an adapter of a fused matrix consists of parts, each for a range of rows. All
parts' A matrices lie in one parameter, and so do the B matrices: two products per layer, whatever the parts. They must
not know files nor groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamount import kernels
from seamount.models.adapter_config import scale_of
from seamount.models.layers import Experts, RMSNorm
from seamount.models.linear import Linear

from . import grouped
from .nf4 import Nf4


@dataclass(frozen=True, slots=True)
class Part:
    """One adapted projection.

    Attributes:
        name: of the module, or stacked parameter, as PEFT calls it.
        start_row, num_rows: which rows of the fused matrix it is.
        rank, alpha, use_rslora: what its scale follows from.
    """

    name: str
    start_row: int
    num_rows: int
    rank: int
    alpha: float
    use_rslora: bool

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return scale_of(self.rank, self.alpha, use_rslora=self.use_rslora)


class AdaptedLinear(Linear):
    """A frozen linear layer, with low-rank parts beside it or without; computed in the type of the activations.

    Attributes:
        parts: in the order of their rows.
        lora_a: `[P * r, in_features]` fp32, part after part; r is the largest rank, and the rows by which a part has
            less are zero.
        lora_b: `[M, r]` fp32, the parts' rows one after the other. Zero beside zero rows of A, both stay zero: neither
            has a gradient.
        nf4: the weight, where it is held in 4 bits; `weight` is then None.
    """

    nf4: Nf4 | None
    _spread: Tensor | None
    _rows: Tensor | None

    def __init__(self, base: Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.nf4 = None
        self.parts: tuple[Part, ...] = ()
        self._dropout = 0.0

    def add_parts(self, parts: Sequence[Part], *, dropout: float, device: torch.device) -> None:
        """Make room for these parts, all zero."""
        self.parts, self._dropout = tuple(sorted(parts, key=lambda part: part.start_row)), dropout
        rank, num_rows = max(part.rank for part in parts), sum(part.num_rows for part in parts)
        self.lora_a = nn.Parameter(torch.zeros(len(parts) * rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(num_rows, rank, device=device))
        spread = rows = None
        if len(parts) > 1:  # which part's columns a row of B stands in, and with which scale
            spread = torch.zeros(num_rows, len(parts), device=device)
            for index, (start, part) in enumerate(zip(self._starts(), self.parts, strict=True)):
                spread[start : start + part.num_rows, index] = part.scale
        if num_rows < self.out_features:
            rows = torch.cat([torch.arange(p.start_row, p.start_row + p.num_rows) for p in self.parts]).to(device)
        self.register_buffer("_spread", spread, persistent=False)
        self.register_buffer("_rows", rows, persistent=False)

    def part(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of one part's A `[rank, in_features]` and B `[num_rows, rank]`."""
        part, rank, start = self.parts[index], self.lora_b.shape[1], self._starts()[index]
        return (
            self.lora_a[index * rank : index * rank + part.rank],
            self.lora_b[start : start + part.num_rows, : part.rank],
        )

    def forward(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """See `Linear.forward`."""
        if norm is not None:
            x = norm(x)
        if self.nf4 is None:
            out = F.linear(x, self.weight, self.bias)
        else:
            out = self.nf4.multiply(x)
            out = out if self.bias is None else out + self.bias
        if self.parts:
            inner = F.linear(F.dropout(x, self._dropout, self.training), self.lora_a.to(x.dtype))
            out = out.addmm_(inner.to(out.dtype), self._whole_b().to(out.dtype).T)
        if gated:
            out = kernels.swiglu(out)
        return out if add_to is None else add_to + out

    def whole_weight(self) -> Tensor:
        """The weight with all that is beside it, in the type of the weight, or fp32 where that is in 4 bits."""
        weight = self.weight if self.nf4 is None else self.nf4.dequantize(torch.float32)
        return weight + (self._whole_b() @ self.lora_a).to(weight.dtype) if self.parts else weight

    def _whole_b(self) -> Tensor:
        """B of the fused matrix with the scales in it, `[out_features, P * r]`: a part's rows meet its columns only."""
        if self._spread is None:
            whole = self.lora_b * self.parts[0].scale
        else:
            whole = (self.lora_b.unsqueeze(1) * self._spread.unsqueeze(2)).flatten(1)
        if self._rows is None:
            return whole
        return whole.new_zeros(self.out_features, whole.shape[1]).index_copy(0, self._rows, whole)

    def _starts(self) -> list[int]:
        """The first row of each part within `lora_b`."""
        starts, end = [], 0
        for part in self.parts:
            starts.append(end)
            end += part.num_rows
        return starts


class AdaptedExperts(Experts):
    """The routed experts of a layer, frozen, with low-rank matrices of their own beside them; rows are sorted once.

    Attributes:
        parts: by leaf, `gate_up_proj` or `down_proj`; gate and up share an A, as in PEFT.
        gate_up_proj_lora_a: `[E, r, C]` fp32, where it is adapted; gate_up_proj_lora_b: `[E, 2I, r]`; likewise for
            down_proj.
        gate_up_proj_nf4, down_proj_nf4: the weights, where they are held in 4 bits.
    """

    gate_up_proj_nf4: Nf4 | None
    down_proj_nf4: Nf4 | None

    def __init__(self, base: Experts) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.packed = None
        self.num_experts, width, self._hidden_size = base.gate_up_proj.shape[0], *base.gate_up_proj.shape[1:]
        self._inner_size = width // 2
        self.gate_up_proj_nf4 = self.down_proj_nf4 = None
        self.parts: dict[str, Part] = {}
        self._dropout = 0.0

    def add_part(self, leaf: str, part: Part, *, dropout: float, device: torch.device) -> None:
        """Make room for an adapter of one of the two stacks, all zero."""
        self.parts[leaf], self._dropout = part, dropout
        columns = self._hidden_size if leaf == "gate_up_proj" else self._inner_size
        for side, shape in (("a", (part.rank, columns)), ("b", (part.num_rows, part.rank))):
            values = torch.zeros(self.num_experts, *shape, device=device)
            self.register_parameter(f"{leaf}_lora_{side}", nn.Parameter(values))

    def part(self, leaf: str) -> tuple[Tensor, Tensor]:
        """A `[E, r, C]` and B `[E, N, r]` of one of the two stacks."""
        return self.get_parameter(f"{leaf}_lora_a"), self.get_parameter(f"{leaf}_lora_b")

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor) -> Tensor:
        """See `Experts.forward`."""
        if not torch.is_grad_enabled():
            return residual + kernels.run_each_expert(x, weights, ids, self.num_experts, self._expert)
        out = kernels.run_grouped_experts(
            x,
            weights,
            ids,
            self.num_experts,
            lambda rows, sizes: self._product("gate_up_proj", rows, sizes),
            lambda rows, sizes: self._product("down_proj", rows, sizes),
        )
        return residual + out

    def _product(self, leaf: str, rows: Tensor, sizes: Tensor) -> Tensor:
        dropped = adapter = None
        if leaf in self.parts:
            a, b = self.part(leaf)
            adapter = a.to(rows.dtype), (b * self.parts[leaf].scale).to(rows.dtype)
            if self._dropout and self.training:
                dropped = F.dropout(rows, self._dropout)
        width = 2 * self._inner_size if leaf == "gate_up_proj" else self._hidden_size
        return grouped.multiply(
            rows, sizes, lambda expert: self._matrix(leaf, expert, rows.dtype), width, adapter, dropped
        )

    def _expert(self, x: Tensor, index: int) -> Tensor:
        """One expert's network without gradients."""
        for leaf in ("gate_up_proj", "down_proj"):
            out = F.linear(x, self._matrix(leaf, index, x.dtype))
            if leaf in self.parts:
                a, b = self.part(leaf)
                inner = F.linear(x, a[index].to(x.dtype))
                out = out.addmm_(inner, (b[index] * self.parts[leaf].scale).to(x.dtype).T)
            x = kernels.swiglu(out) if leaf == "gate_up_proj" else out
        return x

    def _matrix(self, leaf: str, index: int, dtype: torch.dtype) -> Tensor:
        nf4: Nf4 | None = getattr(self, f"{leaf}_nf4")
        if nf4 is not None:
            return nf4.dequantize(dtype, index)
        stack: Tensor = getattr(self, leaf)
        return stack[index].detach()


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
