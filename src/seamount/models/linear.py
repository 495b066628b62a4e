"""A linear layer, whichever way its weight is stored: as a parameter (training, GPUs) or packed for this CPU's kernels.

What surrounds a product in every layer is part of the call, because the packed form does it in the same pass: the norm
or the gate before it, the residual sum after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamount import kernels

if TYPE_CHECKING:
    from .layers import RMSNorm


class Linear(nn.Linear):
    """`y = x W^T + b`.

    Attributes:
        packed: set when the weight was packed while loading; `weight` and `bias` are then gone.
    """

    packed: kernels.PackedMatrix | None = None

    def forward(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Return the product for `x [T, in_features]`.

        Args:
            norm: applied to x first.
            gated: the outputs are a gate half and an up half; `silu(gate) * up` `[T, out_features / 2]` is returned.
            add_to: `[T, out_features]`, added to the result; a packed layer writes it in place.
        """
        if self.packed is not None:
            if norm is not None:
                return self.packed.multiply(x, norm=norm.weight, eps=norm.eps, add_to=add_to)
            return self.packed.multiply(x, add_to=add_to)
        if norm is not None:
            x = norm(x)
        if add_to is not None and self.bias is None and x.is_cuda and not torch.is_grad_enabled():
            # The library adds the residual while it writes the product.
            return torch.addmm(add_to, x, self.weight.T)
        out = F.linear(x, self.weight, self.bias)
        if gated:
            out = kernels.swiglu(out)
        return out if add_to is None else add_to + out

    def whole_weight(self) -> Tensor:
        """The matrix that x is multiplied with, `[out_features, in_features]`, of a layer that is not packed."""
        return self.weight

    def use_packed(self, matrix: kernels.PackedMatrix) -> None:
        """Multiply with `matrix` from now on and drop the parameters."""
        self.packed = matrix
        del self.weight
        self.register_parameter("bias", None)
