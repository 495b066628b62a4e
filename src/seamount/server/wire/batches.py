"""Schemas of /v1/batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .common import Text, WireModel
from .files import MAX_LIFETIME_S, MIN_LIFETIME_S
from .responses import ResponseUsage

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
_Key = Annotated[Text, Field(max_length=64)]
_Value = Annotated[Text, Field(max_length=512)]


class ExpiresAfter(WireModel):
    """How long what a batch makes is kept."""

    anchor: Literal["created_at"] = Field(description="When the file was made.")
    seconds: int = Field(ge=MIN_LIFETIME_S, le=MAX_LIFETIME_S)


class BatchRequest(WireModel):
    """Work that may take a day."""

    input_file_id: Text = Field(max_length=128, description="A file of purpose batch: a request on each line.")
    endpoint: BatchEndpoint = Field(description="Where every line's request goes.")
    completion_window: Literal["24h"]
    metadata: dict[_Key, _Value] | None = Field(None, max_length=16, description="The caller's own notes.")
    output_expires_after: ExpiresAfter | None = None


class BatchError(WireModel):
    """Why a batch failed; `line` counts the lines of its file from 1."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(WireModel):
    """All that was found, up to a hundred."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(WireModel):
    """Lines: all, answered, and answered with an error."""

    total: int
    completed: int
    failed: int


class BatchObject(WireModel):
    """A batch, as far as it has come.

    Attributes:
        usage: of all answers that there are; null where the batch was made before that was counted.
    """

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: ResponseUsage | None
    metadata: dict[str, str] | None


class BatchList(WireModel):
    """A page of batches, the newest first. The next one is asked for with `after`: the last id of this one."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
