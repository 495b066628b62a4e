"""Schemas of /v1/models: OpenAI's names, and beside them those that Anthropic's clients look for."""

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
    type: Literal["model"] = "model"
    display_name: str
    created_at: str


class ModelList(WireModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False
