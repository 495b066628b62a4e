"""What is asked of every peer: shapes, rows and prompts. Pure; the same seed gives everybody the same token ids."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Prompts avoid the special tokens, which stand at either end of the vocabulary.
_FIRST_ID, _LAST_IDS = 64, 8
_SPARE_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        prompt_tokens: of each request; `shared_tokens` of them are common to all requests and already cached.
        concurrency: requests handed over at once.
        new_tokens: N of the second timing, which asks for 1 + N tokens.
    """

    name: str
    prompt_tokens: int
    concurrency: int
    new_tokens: int
    shared_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Room that one sequence needs, with a little spare."""
        return self.prompt_tokens + self.new_tokens + _SPARE_TOKENS


# Cheap rows first, so that a run that is cut short has them. At 2,048 more new tokens are decoded: there the time to
# decode is the difference of two long times.
ROWS = (
    Row("128x1", 128, 1, 64),
    Row("128x8", 128, 8, 64),
    Row("128x32", 128, 32, 64),
    Row("2048x1", 2048, 1, 64),
    Row("shared", 1152, 32, 64, shared_tokens=1024),
    Row("2048x8", 2048, 8, 128),
    Row("2048x32", 2048, 32, 128),
)


@dataclass(frozen=True)
class Shape:
    """A network: how its checkpoint is made, or where it is."""

    name: str
    recipe: str | None
    layers: int | None = None
    folder: Path | None = None


def fit(row: Row, config: dict[str, Any]) -> Row:
    """The row with a prompt short enough for the network's longest context."""
    longest = config["max_position_embeddings"] - row.new_tokens - _SPARE_TOKENS
    prompt = min(row.prompt_tokens, longest)
    return Row(row.name, prompt, row.concurrency, row.new_tokens, min(row.shared_tokens, prompt - 1))


def prompts(row: Row, vocab_size: int, seed: str) -> list[list[int]]:
    """Random token ids, `concurrency` prompts; the shared part is first."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return draw.choices(range(_FIRST_ID, vocab_size - _LAST_IDS), k=count)

    shared = ids(row.shared_tokens)
    return [shared + ids(row.prompt_tokens - row.shared_tokens) for _ in range(row.concurrency)]


def seeding(row: Row, asked: list[list[int]], seed: str) -> list[list[int]]:
    """What is asked, untimed, before a shared-prefix row: the prefix with another end, once for every request."""
    draw = random.Random(seed + "/seeding")
    return [[*prompt[: row.shared_tokens], draw.randrange(_FIRST_ID, 1000)] for prompt in asked]


def warm_up(row: Row, vocab_size: int, seed: str) -> list[list[int]]:
    """One prompt of full length and short ones beside it: every shape is met once, cheaply."""
    asked = prompts(row, vocab_size, seed + "/warm-up")
    return [asked[0]] + [prompt[-min(len(prompt), 128) :] for prompt in asked[1:]]


def read_config(folder: Path) -> dict[str, Any]:
    """The network's config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def cache_bytes_per_token(config: dict[str, Any]) -> int:
    """What a 16-bit cache of keys and values takes; latent attention is counted expanded, as some peers keep it."""
    heads = config["num_attention_heads"]
    if "kv_lora_rank" in config:
        values = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"])
    else:
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        values = 2 * config["num_key_value_heads"] * head_dim
    return 2 * values * config["num_hidden_layers"]
