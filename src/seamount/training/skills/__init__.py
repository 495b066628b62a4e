"""The skills of the embedded model: what each one asks and the exact answer it wants, in English and Chinese.

`generate` is a pure function of skill, language, seed and index. Called by `training.pretraining.corpus` (training side
of the split) and `training.evaluate` (held-out side).
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from random import Random

from seamount.training.skills import arithmetic, commands, extraction, masking, tools, unknown
from seamount.training.skills.item import LANGUAGES, Item

SKILLS: dict[str, Callable[[Random, str], Item]] = {
    module.NAME: module.make for module in (arithmetic, extraction, masking, commands, tools, unknown)
}

# Hard cases of a skill, drawn apart so that training can practise them more often; evaluation knows nothing of them.
PRACTICE: dict[str, Callable[[Random, str], Item]] = {"tools_refusal": tools.make_refusal}

__all__ = ["LANGUAGES", "PRACTICE", "SKILLS", "Item", "draw", "generate", "random_of"]


def random_of(*parts: str | int) -> Random:
    """A random generator that depends on `parts` alone, the same on every machine."""
    digest = blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return Random(int.from_bytes(digest, "big"))


def draw(rng: Random, skill: str, language: str, *, held_out: bool = False) -> Item:
    """The next item from `rng` on the wanted side of the split."""
    make = SKILLS.get(skill) or PRACTICE[skill]
    while True:
        item = make(rng, language)
        if item.held_out == held_out:
            return item


def generate(skill: str, language: str, seed: int, index: int, *, held_out: bool = False) -> Item:
    """Item number `index` of a skill and language; pure. Raises KeyError for an unknown skill."""
    return draw(random_of("item", skill, language, seed, index, held_out), skill, language, held_out=held_out)
