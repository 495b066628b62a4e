"""Lines of files of any size and any state: decoded one by one, bounded, with what is broken said in its place.

Called by `reading` and `tables`. Knows nothing of records.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

MAX_RECORD_BYTES = 16 << 20
BROKEN_ARCHIVE = (EOFError, zlib.error, gzip.BadGzipFile)
_BOM = "\ufeff"
_WIDE = (b"\xff\xfe", b"\xfe\xff")
_WIDE_PROBLEM = "is not UTF-8 but UTF-16: convert the file, for instance with iconv"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, or what is wrong with it.

    Attributes:
        number: from 1.
        text: with its end; empty where there is a problem.
        problem: why there is no text.
        end: bytes of the (unpacked) file up to its end, from where `lines_of` can go on.
    """

    number: int
    text: str
    problem: str = ""
    end: int = 0


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, unpacked if its name ends in .gz."""
    return cast(BinaryIO, gzip.open(path) if path.name.endswith(".gz") else path.open("rb"))


def lines_of(path: Path, *, offset: int = 0, number: int = 0) -> Iterator[Line]:
    """Yield the lines of a UTF-8 file; one that is too long is a problem and is passed over, whatever its length.

    Args:
        offset, number: `end` and `number` of the line before the first that is wanted.

    Raises:
        OSError: the file cannot be read.
    """
    with open_bytes(path) as file:
        file.seek(offset)
        while True:
            number += 1
            passed = 0
            try:
                raw = file.readline(MAX_RECORD_BYTES)
                if len(raw) == MAX_RECORD_BYTES and not raw.endswith(b"\n"):
                    passed = _pass_over(file)
            except BROKEN_ARCHIVE as cause:
                yield Line(number, "", _cannot_unpack(cause))
                return
            if not raw:
                return
            if number == 1 and raw[:2] in _WIDE:
                yield Line(number, "", _WIDE_PROBLEM)
                return
            if passed:
                end = offset + len(raw) + passed
                yield Line(number, "", f"is longer than {MAX_RECORD_BYTES >> 20} MiB", end)
            else:
                yield _decoded(number, raw, offset)
            offset += len(raw) + passed


def blocks_of(path: Path, num_bytes: int = 1 << 20) -> Iterator[Line]:
    """Yield a UTF-8 file's text in blocks of about so many bytes; a problem is the last one.

    Raises:
        OSError: the file cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = number = 0
    with open_bytes(path) as file:
        while True:
            number += 1
            try:
                raw = file.read(num_bytes)
            except BROKEN_ARCHIVE as cause:
                yield Line(number, "", _cannot_unpack(cause))
                return
            if number == 1 and raw[:2] in _WIDE:
                yield Line(number, "", _WIDE_PROBLEM)
                return
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as cause:
                yield Line(number, "", _not_utf8(cause, offset - held))
                return
            if not raw:
                return
            yield Line(number, text.removeprefix(_BOM) if number == 1 else text)
            offset += len(raw)


def _decoded(number: int, raw: bytes, offset: int) -> Line:
    try:
        text = raw.decode()
    except UnicodeDecodeError as cause:
        return Line(number, "", _not_utf8(cause, offset), offset + len(raw))
    return Line(number, text.removeprefix(_BOM) if number == 1 else text, end=offset + len(raw))


def _not_utf8(cause: UnicodeDecodeError, offset: int) -> str:
    byte = cause.object[cause.start]
    return f"is not UTF-8: byte {offset + cause.start} of the file is 0x{byte:02x} ({cause.reason})"


def _cannot_unpack(cause: Exception) -> str:
    return f"cannot be unpacked ({cause}); what follows in the file was not read"


def _pass_over(file: BinaryIO) -> int:
    """Read to the line's end and return how many bytes that were."""
    passed = 0
    while piece := file.readline(1 << 20):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed
