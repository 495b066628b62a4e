"""A config like a teacher's, of at most a share of its weights: `shrunk_config`. Pure. Called by `student`."""

from __future__ import annotations

from typing import Any

from seamount.core.errors import ConfigError
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

# Of the teacher's hidden size, the widest first; and of its feed-forward widths.
_WIDTHS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
_STEPS = 32
_LEAST = 0.25
_MULTIPLE = 8


def shrunk_config(raw: dict[str, Any], config: ModelConfig, share: float) -> dict[str, Any]:
    """The config.json of a student.

    It keeps the hidden size if at least a quarter of the layers and of the feed-forward width can then be kept, else it
    is narrower too: where the tokens' embeddings are a large part of a model, they leave the layers nothing. Layers and
    feed-forward width shrink alike. Heads, latent widths and the number of experts stay; MTP blocks are left out.

    Args:
        raw, config: the teacher's config.json, as it is and as it is understood.
        share: of the teacher's weights, MTP blocks not counted.

    Raises:
        ConfigError: the share is too small for any such model.
    """
    most = share * _count({**raw, "num_nextn_predict_layers": 0})
    for least, width in [(_LEAST, width) for width in _WIDTHS] + [(0.0, width) for width in _WIDTHS]:
        found = _largest(raw, config, width, least, most)
        if found is not None:
            return found
    raise ConfigError(
        f"student.shrink: no model like the teacher has only {share:.3g} of its weights.",
        hint="Give a larger share, or a config of another form in student.config.",
    )


def _largest(
    raw: dict[str, Any], config: ModelConfig, width: float, least: float, most: float
) -> dict[str, Any] | None:
    """Of one hidden size, the config that keeps most of what it keeps least of: layers, or feed-forward width."""
    best: dict[str, Any] | None = None
    for num_layers in range(config.num_layers, 0, -1):
        for step in range(_STEPS, 0, -1):
            kept = min(num_layers / config.num_layers, step / _STEPS)
            if kept <= least:
                break
            found = _with_sizes(raw, config, width, num_layers, step / _STEPS)
            if _count(found) <= most:
                best, least = found, kept
                break
    return best


def teachers_layer(index: int, num_layers: int, num_taught: int) -> int:
    """Which of the teacher's layers a student's layer begins as: spread evenly, from the first to the last."""
    return round(index * (num_taught - 1) / max(num_layers - 1, 1))


def _count(raw: dict[str, Any]) -> int:
    return sum(place.num_values for place in placements(ModelConfig.from_dict(raw)))


def _with_sizes(
    raw: dict[str, Any], config: ModelConfig, width: float, num_layers: int, inner: float
) -> dict[str, Any]:
    changed: dict[str, Any] = {
        "hidden_size": _scaled(config.hidden_size, width),
        "num_hidden_layers": num_layers,
        "intermediate_size": _scaled(config.intermediate_size, inner),
    }
    if config.experts is not None:
        changed["moe_intermediate_size"] = _scaled(config.experts.intermediate_size, inner)
        layers = [teachers_layer(index, num_layers, config.num_layers) for index in range(num_layers)]
        changed["first_k_dense_replace"] = sum(layer < config.experts.num_dense_layers for layer in layers)
    if config.latent is None:
        changed["head_dim"] = config.head_dim  # else it would follow from the hidden size
    if config.num_mtp_layers:
        changed["num_nextn_predict_layers"] = 0
    kept = {name: value for name, value in raw.items() if name != "quantization_config"}
    if isinstance(kept.get("layer_types"), list):
        kept["layer_types"] = kept["layer_types"][:num_layers]
    return kept | changed


def _scaled(size: int, share: float) -> int:
    return max(round(size * share / _MULTIPLE) * _MULTIPLE, _MULTIPLE)
