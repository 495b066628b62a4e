"""What the server's process and the worker's process say to each other, and how it is framed.

Messages are frozen dataclasses in `core.codec`'s msgpack form, each preceded by its length as four bytes, over a Unix
socket pair that no third process can open.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from seamount.core.codec import Codec
from seamount.core.errors import BackendError
from seamount.core.requests import Chunk, EngineStats, ModelFacts, Request

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Start:
    """Load this model; `config` is an EngineConfig as JSON."""

    config: str


@dataclass(frozen=True)
class Submit:
    """Continue this request."""

    request: Request


@dataclass(frozen=True)
class Abort:
    """Stop working on this request; chunks that close its sequences follow."""

    request_id: str


@dataclass(frozen=True)
class Progress:
    """Loading goes on."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    facts: ModelFacts


@dataclass(frozen=True)
class Failed:
    """The model cannot be loaded; fields of `core.errors.error_to_fields`. The worker ends after it."""

    error: dict[str, str | float | None]


@dataclass(frozen=True)
class Stepped:
    """What the last step and the last messages brought."""

    chunks: tuple[Chunk, ...]
    stats: EngineStats


CODEC = Codec(Start, Submit, Abort, Progress, Ready, Failed, Stepped)


def frame(message: object) -> bytes:
    """Return the message as bytes ready for the socket."""
    body = CODEC.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise BackendError(f"A message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}.")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Return the length that a frame's header announces.

    Raises:
        BackendError: it is over the limit, so the stream is not ours or broken.
    """
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise BackendError(f"A frame announces {length} bytes; the limit is {MAX_FRAME_BYTES}.")
    return length
