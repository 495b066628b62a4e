"""What a network is trained on: `Example`. Made by `rendering`, kept by `shards`, packed for the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens, and which of them are learnt.

    Attributes:
        token_ids: `[n]` int32.
        trained: `[n]` bool: the loss counts the guess of this token. The first is never True: nothing guesses it.
    """

    token_ids: np.ndarray
    trained: np.ndarray
