"""Schemas of /v1/models."""

from __future__ import annotations

from typing import Literal

from .common import WireModel


class ModelCard(WireModel):
    """One model that requests may name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["seamount"] = "seamount"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(WireModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
