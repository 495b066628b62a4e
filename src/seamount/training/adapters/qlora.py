"""QLoRA: a network whose own matrices are held in 4 bits while adapters beside them learn (arXiv 2305.14314).

Called where a run's network is opened. How a matrix is held is in `nf4`.
"""

from __future__ import annotations

from seamount.models.layers import Experts
from seamount.models.linear import Linear
from seamount.models.network import CausalLM

from .layers import AdaptedExperts, AdaptedLinear, replace
from .nf4 import Nf4


def quantize_base(model: CausalLM) -> None:
    """Hold the matrices of the decoder's layers in 4 bits from now on, one after the other, on their device.

    Embedding, head, norms, routers, biases and multi-token-prediction blocks stay as they are, adapters too. May come
    before or after these. The network cannot be saved then, nor be cast to another type.
    """
    for name, module in list(model.layers.named_modules(prefix="layers")):
        if isinstance(module, Linear):
            linear = module if isinstance(module, AdaptedLinear) else AdaptedLinear(module)
            linear.nf4 = Nf4(linear.weight)
            linear.weight = None  # type: ignore[assignment]
            replace(model, name, linear)
        elif isinstance(module, Experts):
            experts = module if isinstance(module, AdaptedExperts) else AdaptedExperts(module)
            for leaf in ("gate_up_proj", "down_proj"):
                setattr(experts, f"{leaf}_nf4", Nf4(getattr(experts, leaf)))
                setattr(experts, leaf, None)
            replace(model, name, experts)
