"""Reads a calibration file: what quantization shows the model, so that it learns which weights matter.

Called by `compress`. Text with a sample per line, or JSON lines with `text` or `messages`; encoded as the
model's own prompts are. The file is the user's and may be broken: every problem names its line. Knows no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from seamount.core.errors import ConfigError, SeamountError
from seamount.models.prompt import PromptEncoder

MAX_BYTES = 256 * 2**20
# Fewer tokens than this say next to nothing about which inputs are large.
FEWEST_TOKENS = 256
_CHARS_PER_TOKEN = 32  # beyond this many times the limit, a text is cut before it is encoded
_Record = tuple[int, str | dict[str, Any]]
# What JSON calls the values that are no strings.
_KINDS = {
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_HINT = 'Give a text file with one sample per line, or JSON lines with {"text": ...} or {"messages": [...]}.'


def read_samples(
    path: Path, encoder: PromptEncoder, *, num_samples: int, sample_tokens: int, shortest: int
) -> list[list[int]]:
    """Return token ids of up to `num_samples` samples, spread evenly over the file, each cut to `sample_tokens`.

    Those of fewer than `shortest` tokens are left out.

    Raises:
        ConfigError: the file cannot be read, is not text, holds a record of another form, or gives fewer than
            FEWEST_TOKENS tokens in all.
    """
    records = list(_records(path))
    if not records:
        raise ConfigError(f"The calibration file {path} is empty.", hint=_HINT)
    samples = []
    for line, record in _spread(records, num_samples):
        try:
            token_ids = _encode(record, encoder, sample_tokens)
        except SeamountError as cause:
            raise ConfigError(f"{path}, line {line}: {cause.message}", hint=cause.hint or _HINT) from cause
        if len(token_ids) >= shortest:
            samples.append(token_ids)
    num_tokens = sum(map(len, samples))
    if num_tokens < FEWEST_TOKENS:
        raise ConfigError(
            f"The calibration file {path} gives {num_tokens} tokens; at least {FEWEST_TOKENS} are needed.",
            hint=f"Tens of thousands are better. Samples of fewer than {shortest} tokens are left out.",
        )
    return samples


def _records(path: Path) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """Line numbers and records: a text, or the object of a JSON line."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"The calibration file {path} is over {MAX_BYTES >> 20} MiB.", hint="Give a part of it.")
        content = path.read_bytes()
    except OSError as cause:
        raise ConfigError(f"The calibration file {path} cannot be read: {cause.strerror}.", hint=_HINT) from cause
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        broken = content.count(b"\n", 0, cause.start) + 1
        raise ConfigError(f"The calibration file {path} is not UTF-8 text: see line {broken}.", hint=_HINT) from cause
    if "\0" in text:
        raise ConfigError(f"The calibration file {path} holds zero bytes, so it is no text.", hint=_HINT)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    is_json = path.suffix in (".jsonl", ".ndjson", ".json") or (bool(lines) and lines[0][1].lstrip().startswith("{"))
    for at, line in lines:
        yield at, _object(line, f"{path}, line {at}") if is_json else line.rstrip("\r")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise ConfigError(f"{where} is not valid JSON: {cause}.", hint=_HINT) from cause
    if not isinstance(record, dict) or not ("text" in record or "messages" in record):
        raise ConfigError(f"{where} has neither text nor messages.", hint=_HINT)
    return record


def _encode(record: str | dict[str, Any], encoder: PromptEncoder, sample_tokens: int) -> list[int]:
    if isinstance(record, dict) and "messages" in record:
        return list(encoder.encode_chat(record["messages"]).token_ids[:sample_tokens])
    text = record["text"] if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise ConfigError(f"The field text holds {_KINDS[type(text)]}, not a string.", hint=_HINT)
    return list(encoder.encode_text(text[: sample_tokens * _CHARS_PER_TOKEN])[:sample_tokens])


def _spread(records: Sequence[_Record], count: int) -> list[_Record]:
    """Up to `count` records at even distances, in their order."""
    if len(records) <= count:
        return list(records)
    return [records[place * len(records) // count] for place in range(count)]
