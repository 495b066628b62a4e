"""Schemas of /v1/files. What is sent is no JSON: `server.files_upload` reads it."""

from __future__ import annotations

from typing import Literal

from .common import WireModel

Purpose = Literal["batch", "batch_output"]
# Seconds that a file is kept. OpenAI's longest is 30 days, which is what a file gets here that says nothing.
MIN_LIFETIME_S = 3600
MAX_LIFETIME_S = 90 * 86_400
DEFAULT_LIFETIME_S = 30 * 86_400


class FileObject(WireModel):
    """A file: one that was sent, or one that a batch made."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(WireModel):
    """A page of files. The next one is asked for with `after`: the last id of this one."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(WireModel):
    """A file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
