"""Examples as tensors, which is how versions keep those that are remembered and those that accuracy is measured on.

Called by `pipeline`. It must not know which examples these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from seamount.training.examples.example import Example


def to_tensors(examples: Sequence[Example], prefix: str) -> dict[str, Tensor]:
    """N examples of T tokens in all, one after the other: ids `[T]`, flags `[T]` and lengths `[N]`; of none nothing."""
    if not examples:
        return {}
    token_ids = np.concatenate([example.token_ids for example in examples]).astype(np.int32)
    trained = np.concatenate([example.trained for example in examples])
    lengths = np.array([len(example.token_ids) for example in examples], dtype=np.int32)
    return {
        f"{prefix}.token_ids": torch.from_numpy(token_ids),
        f"{prefix}.trained": torch.from_numpy(trained),
        f"{prefix}.lengths": torch.from_numpy(lengths),
    }


def from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> list[Example]:
    """The examples that `to_tensors` took; none where there is no such prefix."""
    if f"{prefix}.lengths" not in tensors:
        return []
    ends = np.cumsum(tensors[f"{prefix}.lengths"].numpy())[:-1]
    token_ids = np.split(tensors[f"{prefix}.token_ids"].numpy(), ends)
    trained = np.split(tensors[f"{prefix}.trained"].numpy(), ends)
    return [Example(ids, flags) for ids, flags in zip(token_ids, trained, strict=True)]
