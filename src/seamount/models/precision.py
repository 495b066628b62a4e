"""How each matrix of a network is held in memory: decided from headers, before any of it is read.

`models.packing` makes packed matrices of what comes out, `models.footprint` counts their bytes, `ops.inspection` names
them; so the three cannot disagree. Holds no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch

from seamount import kernels
from seamount.core.settings import QuantizationName

from .encoded import PLAIN, Form
from .keymap import Placement

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
_ROUTER = ".gate.weight"
UP_PROJECTION = ".kv_b_proj.weight"


def is_gated(parameter: str) -> bool:
    """Whether the first half of a matrix's outputs gates the second."""
    return parameter.removesuffix(".weight").endswith("gate_up_proj")


@dataclass(frozen=True, slots=True)
class Storage:
    """How one matrix is held.

    Attributes:
        kind: of the packed matrix.
        group: int4 only.
        form: as what its parts are read: codes that are packed as they are, or numbers.
    """

    kind: kernels.Kind
    group: int = kernels.DEFAULT_GROUP
    form: Form = PLAIN


@dataclass(frozen=True)
class Precision:
    """Storage of all matrices of one network.

    Attributes:
        dtype: of what is not quantized.
        quantization: as the setting of the same name.
        is_packed: matrices are packed for the compiled kernels; else everything is a tensor of `dtype`.
        form_of: what the checkpoint tensor of a key holds.
    """

    dtype: torch.dtype
    quantization: QuantizationName = "none"
    is_packed: bool = False
    form_of: Callable[[str], Form] = lambda key: PLAIN

    @property
    def plain_kind(self) -> kernels.Kind:
        """Of packed matrices that are not quantized."""
        return cast("kernels.Kind", str(self.dtype).removeprefix("torch."))

    def storage_of(self, parameter: str, places: Iterable[Placement]) -> Storage:
        """How the packed matrix (or stack of them) `parameter` is held that `places` fill.

        Routers are fp32 always. The up-projections of latent attention serve in small products per head: bf16 where
        they, or everything, would be quantized. Asked for 4 bits, the head gets 8: it is a small part of the whole,
        and costs the most accuracy. Unasked, what is stored in few bits stays so, and parts that differ meet in the
        least precision that holds them all.
        """
        if parameter.endswith(_ROUTER):
            return Storage("float32")
        forms = {self.form_of(place.key) for place in places}
        asked = self.quantization in ("int8", "int4")
        if parameter.endswith(UP_PROJECTION):
            few = asked or (self.quantization == "auto" and PLAIN not in forms)
            return Storage("bfloat16" if few else self.plain_kind)
        if asked:
            kind = "int8" if parameter == HEAD else self.quantization
            return Storage(cast("kernels.Kind", kind))
        if self.quantization == "none" or PLAIN in forms:
            return Storage(self.plain_kind)
        form = forms.pop()
        if forms or not form.has_codes:
            return Storage("int8")
        return Storage("int4", form.group, form) if form.group is not None else Storage("int8", form=form)
