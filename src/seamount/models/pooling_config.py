"""Whether a checkpoint is made for embeddings, and how it makes them; read from its folder.

Called by the engine's `build`, by `load_plan` and by `ops.inspection`. Two things say that a folder is: `modules.json`,
in which sentence-transformers lists what a text passes through (written by its `SentenceTransformer.save`), with a
configuration per module; or weights without a head, which nothing else can be done with. Knows no tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seamount.core.embedding import EmbeddingFacts, PoolingName
from seamount.core.errors import CheckpointError, UnsupportedModelError

from .config import ModelConfig
from .fields import Fields
from .locate import is_gguf
from .tokenizer import read_json_object, read_text

MODULES_NAME = "modules.json"
_MAX_MODULES_BYTES = 2**16
_MAX_TOKENS = 2**24
_MAX_MODULES = 16
# sentence-transformers' words, today's and those that it wrote as switches before.
_POOLINGS: dict[str, PoolingName] = {"lasttoken": "last", "mean": "mean", "cls": "first"}
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def is_embedding_folder(folder: Path) -> bool:
    """Whether the folder lists the modules of an embedding model."""
    return not is_gguf(folder) and (folder / MODULES_NAME).is_file()


def read_pooling(folder: Path, config: ModelConfig, *, max_tokens: int) -> EmbeddingFacts | None:
    """Return how the model of a folder makes embeddings; None where it is not made for them.

    A model without a head whose folder says nothing else gives the last token's hidden state, scaled to length 1: what
    other servers do with such a one.

    Args:
        config: as planned from the weights, which say whether there is a head.
        max_tokens: the engine's context; a folder may limit texts further.

    Raises:
        CheckpointError: a file of the folder is broken; names file and field.
        UnsupportedModelError: it is made for embeddings in a way that would come out wrong here.
    """
    if is_gguf(folder):
        return None
    raw = read_json_object(folder / "config.json") or {}
    is_listed = is_embedding_folder(folder)
    _refuse_both_ways(folder, raw, is_embedding=is_listed or not config.has_head)
    if not is_listed and config.has_head:
        return None
    pooling, normalize = _read_modules(folder) if is_listed else ("last", True)
    limit = _read_limits(folder) if is_listed else None
    return EmbeddingFacts(
        pooling=pooling,
        normalize=normalize,
        num_dimensions=config.hidden_size,
        shorter_dimensions=_shorter(Fields(raw, str(folder / "config.json")), config.hidden_size),
        max_tokens=min(max_tokens, limit or max_tokens),
    )


def _refuse_both_ways(folder: Path, raw: dict[str, Any], *, is_embedding: bool) -> None:
    """Networks of these families attend backwards only, and a checkpoint may be trained to see what follows, too."""
    path = folder / "config.json"
    if raw.get("is_causal") is False or raw.get("use_bidirectional_attention") is True:
        raise UnsupportedModelError(
            f"{path}: this model attends to the tokens that follow, too (bidirectional attention).",
            hint="Only models that attend to what came before are supported.",
        )
    code = raw.get("auto_map")
    if is_embedding and isinstance(code, dict) and "AutoModel" in code:
        raise UnsupportedModelError(
            f"{path}: this embedding model brings Python code of its own (auto_map), which is never run.",
            hint="Such code mostly makes attention bidirectional, which is not supported.",
        )


def _read_modules(folder: Path) -> tuple[PoolingName, bool]:
    """Return which hidden states are taken, and whether the result is scaled."""
    path = folder / MODULES_NAME
    modules = _list_modules(path)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UnsupportedModelError(
            f"{path}: the modules {', '.join(kinds)[:200]} are not supported.",
            hint="Supported: Transformer, Pooling and, where the result is scaled to length 1, Normalize.",
        )
    (_, transformer), (_, pooling), *_ = modules
    if transformer not in ("", "."):
        raise UnsupportedModelError(
            f"{path}: the weights lie in another folder ({transformer[:200]}), not in this one."
        )
    return _read_pooling_module(folder, pooling), len(kinds) == 3


def _list_modules(path: Path) -> list[tuple[str, str]]:
    """Return kind and folder of each module."""
    text = read_text(path, _MAX_MODULES_BYTES) or ""
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path} is not valid JSON: {cause}.", hint="Fetch the file again.") from cause
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise CheckpointError(f"{path} must hold a list of modules.")
    if len(listed) > _MAX_MODULES:
        raise CheckpointError(f"{path} lists {len(listed)} modules; at most {_MAX_MODULES} make sense.")
    fields = [Fields(module, str(path)) for module in listed]
    return [(module.text("type").rpartition(".")[2], module.text("path", "")) for module in fields]


def _read_pooling_module(folder: Path, name: str) -> PoolingName:
    if name in ("", ".", "..") or Path(name).name != name:  # an untrusted folder may name a place outside itself
        raise CheckpointError(f"{folder / MODULES_NAME}: the path of the Pooling module is no folder in this one.")
    path = folder / name / "config.json"
    raw = read_json_object(path)
    if raw is None:
        raise CheckpointError(f"{path} is missing.", hint="It says which hidden states make an embedding.")
    asked = raw.get("pooling_mode")
    if asked is None:
        asked = [mode for switch, mode in _SWITCHES.items() if raw.get(switch) is True] or "mean"
    modes = asked if isinstance(asked, list) else [asked]
    pooling = _POOLINGS.get(str(modes[0])) if len(modes) == 1 else None
    if pooling is None:
        raise UnsupportedModelError(
            f"{path}: the pooling {', '.join(map(str, modes))[:200]} is not supported.",
            hint=f"Supported: one of {', '.join(_POOLINGS)}.",
        )
    return pooling


def _read_limits(folder: Path) -> int | None:
    """Return the most tokens of a text by sentence_bert_config.json; None where it sets no limit."""
    path = folder / "sentence_bert_config.json"
    fields = Fields(read_json_object(path) or {}, str(path))
    if fields.boolean("do_lower_case", default=False):
        raise UnsupportedModelError(f"{path}: do_lower_case is on; texts are not changed here.")
    return fields.optional_integer("max_seq_length", 1, _MAX_TOKENS)


def _shorter(fields: Fields, num_dimensions: int) -> tuple[int, ...] | None:
    """Return the lengths that config.json promises, under the names that other servers read."""
    listed = fields.integers("matryoshka_dimensions", 1, num_dimensions)
    if listed:
        return tuple(sorted({length for length in listed if length < num_dimensions}))
    return () if fields.boolean("is_matryoshka", default=False) else None
