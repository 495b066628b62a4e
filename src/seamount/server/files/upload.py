"""Reads a file that is sent as multipart/form-data straight into the state database.

Called by `files`. What arrives is cut into chunks of whole lines and written as it comes, so that no file is ever whole
in memory or on a disk of its own; whatever ends it early leaves nothing. The form is OpenAI's: `purpose`, `file`, and
`expires_after[anchor]` with `expires_after[seconds]`. `python-multipart` finds the parts (RFC 7578), and bounds their
headers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from seamount.core.errors import InvalidRequestError, SeamountError, TooLargeError
from seamount.core.settings import ServerConfig
from seamount.server.admission.call import STALL_S, ClientStalledError
from seamount.server.errors import ClientGoneError
from seamount.server.wire.files import DEFAULT_LIFETIME_S, MAX_LIFETIME_S, MIN_LIFETIME_S

from .store import FileStore, Lines, StoredFile

# What a form may take beside its file.
FORM_BYTES = 64 * 1024
# A chunk has about so many bytes, or one line; so many are written together.
_CHUNK_BYTES = 256 * 1024
_WRITE_BYTES = 1024 * 1024
_MAX_PARTS = 16
_MAX_FIELD_BYTES = 1024
_MAX_NAME = 255
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


async def receive_file(request: Request, store: FileStore, tenant: str, config: ServerConfig) -> StoredFile:
    """Take the file that a request's body holds, whole or not at all.

    Raises:
        InvalidRequestError: the form or the file is wrong.
        TooLargeError: the file is.
        ForbiddenError: the tenant keeps as much as it may.
        StateUnavailableError: it cannot be kept now.
        ClientGoneError: the client went away.
    """
    form = _Form(request.headers.get("content-type", ""), config.max_file_bytes)
    upload = _Upload(store, tenant, config.max_body_bytes)
    body = aiter(request.stream())
    try:
        while (data := await _next(body)) is not None:
            form.feed(data)
            await upload.add(form.take())
        form.end()
        lifetime_s = form.lifetime_s()
        return await upload.end(form.filename, lifetime_s)
    except BaseException:
        await upload.discard()
        raise


async def _next(body: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(STALL_S):
            return await anext(body, None)
    except TimeoutError as cause:
        raise ClientStalledError("The client stopped sending.") from cause
    except ClientDisconnect as cause:
        raise ClientGoneError from cause


class _Upload:
    """Writes a file's bytes as they come."""

    def __init__(self, store: FileStore, tenant: str, max_line_bytes: int) -> None:
        self._store = store
        self._tenant = tenant
        self._cutter = LineCutter(max_line_bytes)
        self._file_id: str | None = None
        self._num_written = 0
        self._waiting: list[Lines] = []
        self._num_waiting_bytes = 0

    async def add(self, data: bytes) -> None:
        for lines in self._cutter.add(data):
            self._waiting.append(lines)
            self._num_waiting_bytes += len(lines.content)
        if self._num_waiting_bytes >= _WRITE_BYTES:
            await self._write()

    async def end(self, filename: str, lifetime_s: int) -> StoredFile:
        self._waiting += self._cutter.end()
        if not self._waiting and not self._num_written:
            raise InvalidRequestError("The file is empty.", param="file", code="empty_file")
        file_id = await self._write()
        return await self._store.database.call(partial(self._store.complete, file_id, filename, lifetime_s))

    async def discard(self) -> None:
        if self._file_id is not None:
            with suppress(SeamountError):  # what cannot be removed now is swept up later
                await self._store.database.call(partial(self._store.discard, self._file_id))

    async def _write(self) -> str:
        if self._file_id is None:
            self._file_id = self._store.new_file_id()
            await self._store.database.call(partial(self._store.begin, self._file_id, self._tenant, "batch"))
        chunks, self._waiting, self._num_waiting_bytes = self._waiting, [], 0
        await self._store.database.call(partial(self._store.append, self._file_id, self._num_written, chunks))
        self._num_written += len(chunks)
        return self._file_id


class LineCutter:
    """Cuts bytes into chunks of whole lines, as text.

    Args:
        max_line_bytes: a longer line is refused.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._rest = bytearray()
        self._num_searched = 0
        self._line = 1

    def add(self, data: bytes) -> Iterator[Lines]:
        """Yield the chunks that became full.

        Raises:
            InvalidRequestError: a line is too long, or not UTF-8.
        """
        self._rest += data
        if len(self._rest) < _CHUNK_BYTES:
            return
        end = self._rest.rfind(b"\n", self._num_searched) + 1
        if end:
            yield self._cut(end)
        self._num_searched = len(self._rest)
        if len(self._rest) > self._max_line_bytes:
            raise self._too_long()

    def end(self) -> list[Lines]:
        """Return the chunk that is left, if any; the last line needs no end.

        Raises:
            InvalidRequestError: as `add`.
        """
        return [self._cut(len(self._rest))] if self._rest else []

    def _cut(self, end: int) -> Lines:
        data = bytes(self._rest[:end])
        for number, line in enumerate(data.split(b"\n")):
            if len(line) > self._max_line_bytes:
                self._line += number
                raise self._too_long()
        try:
            text = data.decode()
        except UnicodeDecodeError as cause:
            self._line += data.count(b"\n", 0, cause.start)
            raise self._wrong("is not UTF-8", "invalid_encoding") from cause
        if "\0" in text:  # which JSON writes as \u0000, and PostgreSQL cannot keep
            self._line += text.count("\n", 0, text.index("\0"))
            raise self._wrong("holds a null character, which is no JSON", "invalid_encoding")
        lines = Lines(self._line, text)
        self._line += text.count("\n")
        del self._rest[:end]
        self._num_searched = 0
        return lines

    def _too_long(self) -> InvalidRequestError:
        return self._wrong(f"is longer than {self._max_line_bytes} bytes", "line_too_long")

    def _wrong(self, what: str, code: str) -> InvalidRequestError:
        return InvalidRequestError(f"Line {self._line} of the file {what}.", param="file", code=code)


class _Form:
    """The parts of a form, as they come: small fields, and one file whose bytes are handed on."""

    def __init__(self, content_type: str, max_file_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequestError(
                "A file is sent as multipart/form-data, with the fields purpose and file.", code="invalid_body"
            )
        self.fields: dict[str, str] = {}
        self.filename = ""
        self._max_file_bytes = max_file_bytes
        self._num_file_bytes = self._num_parts = 0
        self._has_file = self._is_whole = False
        self._taken = bytearray()
        self._name = ""
        self._value = bytearray()
        self._head_name, self._head_value = bytearray(), bytearray()
        self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Read on.

        Raises:
            InvalidRequestError: this is no such form.
            TooLargeError: the file is too large.
        """
        try:
            self._parser.write(data)
        except FormParserError as cause:
            raise InvalidRequestError(
                "The body is not multipart/form-data as announced.", code="invalid_body"
            ) from cause

    def take(self) -> bytes:
        """Return the file's bytes that came since the last time."""
        taken = bytes(self._taken)
        self._taken.clear()
        return taken

    def end(self) -> None:
        """Check that everything came.

        Raises:
            InvalidRequestError: something is missing.
        """
        if not self._is_whole:
            raise InvalidRequestError("The body ends before its form does.", code="invalid_body")
        if "purpose" not in self.fields:
            raise InvalidRequestError("purpose is required.", param="purpose", code="missing_parameter")
        if not self._has_file:
            raise InvalidRequestError("file is required.", param="file", code="missing_parameter")

    def lifetime_s(self) -> int:
        """Return the seconds that the file is to be kept.

        Raises:
            InvalidRequestError: they cannot be.
        """
        anchor, text = self.fields.get("expires_after[anchor]"), self.fields.get("expires_after[seconds]")
        if anchor is None and text is None:
            return DEFAULT_LIFETIME_S
        if anchor != "created_at":
            raise InvalidRequestError("expires_after.anchor must be created_at.", param="expires_after.anchor")
        seconds = int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else 0
        if not MIN_LIFETIME_S <= seconds <= MAX_LIFETIME_S:
            raise InvalidRequestError(
                f"expires_after.seconds must be a whole number from {MIN_LIFETIME_S} to {MAX_LIFETIME_S}.",
                param="expires_after.seconds",
            )
        return seconds

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise InvalidRequestError(f"The form has more than {_MAX_PARTS} parts.", code="invalid_body")
        self._name, self._disposition = "", b""
        self._value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._head_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._head_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._head_name.lower() == b"content-disposition":
            self._disposition = bytes(self._head_value)
        self._head_name.clear()
        self._head_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self._has_file:
                raise InvalidRequestError("One file is sent at a time.", param="file")
            self._has_file = True
            given = options.get(b"filename", b"").decode(errors="replace")
            self.filename = "".join(letter for letter in given if letter.isprintable())[:_MAX_NAME] or "file"
        elif self._name not in _FIELDS:
            name = self._name[:100]
            raise InvalidRequestError(f"Unknown parameter: {name}.", param=name, code="unknown_parameter")
        elif self._name in self.fields:
            raise InvalidRequestError(f"{self._name} is given twice.", param=self._name, code="duplicate_parameter")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._num_file_bytes += end - start
            if self._num_file_bytes > self._max_file_bytes:
                raise TooLargeError(
                    f"The file is larger than {self._max_file_bytes} bytes.", hint="Split it.", code="file_too_large"
                )
            self._taken += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidRequestError(f"{self._name} is too long.", param=self._name)

    def _on_part_end(self) -> None:
        if self._name == "file":
            return
        value = self._value.decode(errors="replace")
        if self._name == "purpose" and value != "batch":
            raise InvalidRequestError(
                "purpose must be batch: files are kept here for batches only.", param="purpose", code="invalid_value"
            )
        self.fields[self._name] = value

    def _on_end(self) -> None:
        self._is_whole = True
