"""Text to token ids and back, for one checkpoint's `tokenizer.json`.

Called by `models.prompt`; knows nothing of chats. The pipeline (normalising, splitting, merging) is the
`tokenizers` library's; decoding is done here, because it must be incremental. Python tokenizers (`auto_map`,
`tokenizer_class`) are never run.
"""

from __future__ import annotations

import codecs
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.decoders import Decoder

from seamount.core.errors import CheckpointError, InvalidRequestError, UnsupportedModelError

from .reasoning import REASONING_TAGS

MAX_TOKENIZER_BYTES = 128 << 20
MAX_JSON_BYTES = 16 << 20
_PIECE_CHARS = 8192  # small, since merging takes more than linear time in the length of a word
_CUT_ALLOWANCE = 16  # tokens that a cut through a word may add
_TOKENIZER_JSON = "tokenizer.json"
_STAND_IN = f"\U0010fffd{secrets.token_hex(16)}\U0010fffd"  # for an added token; no text can hold it


class TextTokenizer:
    """One checkpoint's tokenizer. Immutable; safe to use from any thread.

    Args:
        folder: holds tokenizer.json; or where `text` comes from, for errors.
        special_tokens: texts that tokenizer_config.json names; those in the vocabulary become special tokens
            even where tokenizer.json does not say so.
        text: what stands in tokenizer.json, for a tokenizer that lies elsewhere.

    Attributes:
        vocab_size: highest token id plus one.
        added_tokens: text of the tokens that are matched before splitting, by id.
        special_ids: ids that `skip_special_tokens` drops; never the reasoning tags, flagged or not.
        marker_ids: ids of the tokens that mark something and are no text: `special_ids` and all others spelled `<...>`.
    """

    def __init__(self, folder: Path, special_tokens: Iterable[str] = (), *, text: str | None = None) -> None:
        path = folder if text is not None else folder / _TOKENIZER_JSON
        if text is None:
            text = read_text(path, MAX_TOKENIZER_BYTES)
        if text is None:
            raise _missing(folder)
        tokenizer = _build(text, path)
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens(
            [text for text in special_tokens if text not in known and tokenizer.token_to_id(text) is not None]
        )
        self._tokenizer = tokenizer
        self._plain_tokenizer = _without_added_tokens(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self.added_tokens: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(
            token_id for token_id, token in added.items() if token.special and token.content not in REASONING_TAGS
        )
        self.marker_ids = self.special_ids | {
            token_id for token_id, text in self.added_tokens.items() if text.startswith("<") and text.endswith(">")
        }
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size == 0:
            raise CheckpointError(f"{path} has an empty vocabulary.")
        self._decoding = _Decoding(tokenizer.decoder, path)
        self._bytes: dict[int, bytes] = {}

    def token_id(self, text: str) -> int | None:
        """Return the id of a token by its exact vocabulary text, None when there is none."""
        return self._tokenizer.token_to_id(text)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the ids of a text in which the texts of special tokens stand for the tokens.

        Raises:
            InvalidRequestError: the text holds a lone surrogate.
        """
        return tuple(_encode(self._tokenizer, text, add_special_tokens=add_special_tokens, with_offsets=False).ids)

    def encode_many(self, pieces: Sequence[tuple[str, dict[str, str]]], *, inside: bool) -> list[tuple[int, ...]]:
        """Return what `encode_guarded` gives for each text and its literals, many at once.

        Args:
            inside: each text stands behind a marker in a longer one, not at the beginning.

        Raises:
            InvalidRequestError: as for `encode_guarded`.
        """
        lead = self._lead if inside else ""
        plain = [lead + text for text, literals in pieces if not literals]
        for text in plain:
            utf8_length(text)
        encodings = iter(self._tokenizer.encode_batch_fast(plain, add_special_tokens=False))
        found = [
            self.encode_guarded(lead + text, literals) if literals else tuple(next(encodings).ids)
            for text, literals in pieces
        ]
        return [ids[1:] for ids in found] if lead else found

    @cached_property
    def _lead(self) -> str:
        """A marker behind which text is encoded as behind any; empty where there is none."""
        probe = " a\n b"
        behind = self.encode_inside(probe)
        for token_id, text in self.added_tokens.items():
            if self.encode(text + probe, add_special_tokens=False) == (token_id, *behind):
                return text
        return ""

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with the vocabulary or the way text is cut."""
        return blake2b(self._tokenizer.to_str().encode(), digest_size=8).hexdigest()

    def count_beyond(self, text: str, limit: int, literals: Mapping[str, str] | None = None) -> int | None:
        """Return how many tokens the text has at least if these are more than `limit`; else None.

        Counts piece by piece and stops at the limit, so that a text far too long costs no more than one that
        fits. None does not promise that the text fits.

        Args:
            literals: as for `encode_guarded`.

        Raises:
            InvalidRequestError: the text holds a lone surrogate.
        """
        if utf8_length(text) <= limit:  # a token takes at least a byte
            return None
        table = {ord(placeholder): literal for placeholder, literal in (literals or {}).items()}
        count = 0
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS].translate(table)
            count += len(_encode(self._tokenizer, piece, add_special_tokens=False, with_offsets=False))
            count -= self._cut_allowance(text, start) if start else 0
            if count > limit:
                return count
        return None

    def _cut_allowance(self, text: str, cut: int) -> int:
        longest = max(map(len, self.added_tokens.values()), default=0)
        around = text[max(cut - longest, 0) : cut + longest]
        # A marker cut in two becomes plain text: at most a token per byte.
        cut_bytes = max((len(token.encode()) for token in self.added_tokens.values() if token in around), default=0)
        return _CUT_ALLOWANCE + cut_bytes

    def encode_guarded(self, text: str, literals: dict[str, str]) -> tuple[int, ...]:
        """Return the ids of a text in which some characters stand for others that must not be part of a marker.

        Equal to `encode` with the characters replaced, but that no added token is found where one of them is
        part of it.

        Args:
            text: rendered chat.
            literals: placeholder (one character that occurs nowhere else) to the text that it stands for.

        Raises:
            InvalidRequestError: the literal text becomes a special token even as plain text.
        """
        encoding = _encode(self._tokenizer, text, add_special_tokens=False, with_offsets=True)
        table = {ord(placeholder): literal for placeholder, literal in literals.items()}
        ids: list[int] = []
        pending: list[int] = []
        start = 0
        for token_id, (begin, end) in [
            *zip(encoding.ids, encoding.offsets, strict=True),
            (None, (len(text), -1)),
        ]:
            if token_id is not None and token_id not in self.added_tokens:
                pending.append(token_id)
                continue
            stretch = text[start:begin]
            literal = stretch.translate(table)
            ids.extend(pending if literal == stretch else self._encode_plain(literal, at_start=start == 0))
            pending, start = [], end
            if token_id is not None:
                ids.append(token_id)
        return tuple(ids)

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of plain letters in the middle of a text; markers are not looked for.

        Raises:
            InvalidRequestError: the text holds a lone surrogate.
        """
        # Some tokenizers treat the beginning of the whole text in their own way; behind the stand-in it is
        # the middle.
        ids: list[int] = _encode(
            self._plain_tokenizer, _STAND_IN + text, add_special_tokens=False, with_offsets=False
        ).ids
        return ids[1:]

    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        ids: list[int] = (
            _encode(self._plain_tokenizer, text, add_special_tokens=False, with_offsets=False).ids
            if at_start
            else self.encode_inside(text)
        )
        if any(token_id in self.special_ids for token_id in ids):
            raise InvalidRequestError(
                "A message holds a special token's text, which this tokenizer cannot write as plain text.",
                param="messages",
            )
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for in the middle of a text; none for an id without token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            known = b"" if token is None else self._decoding.bytes_of(token)
            self._bytes[token_id] = known
        return known

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """Return a fresh detokenizer for one sequence."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens, strip_start=self._decoding.strip_start)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the whole text at once: by construction what a detokenizer gives in pieces."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.flush()


class Detokenizer:
    """Turns the tokens of one sequence into text as they come; constant work per token.

    Text is certain once its UTF-8 is whole: the bytes of an unfinished character are held back. Bytes that
    cannot become a character turn into U+FFFD, one per maximal invalid stretch (Unicode 16, section 3.9), at
    once or at `flush`.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool, strip_start: int) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._strip_left = strip_start  # spaces that the decoder takes off the beginning of the text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens and return the text that became certain."""
        data = b"".join(self._tokenizer.token_bytes(i) for i in token_ids if i not in self._skipped)
        return self._stripped(self._utf8.decode(data))

    def flush(self) -> str:
        """Return what was held back: U+FFFD for an unfinished character, else nothing."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if not text.startswith(" "):
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class _Decoding:
    """How token texts become bytes: read from `decoder` of tokenizer.json.

    Known are byte-level BPE (each character of a token's text stands for a byte) and SentencePiece ("▁" for a
    space, `<0xNN>` for a byte). Others are refused rather than decoded wrongly.
    """

    def __init__(self, decoder: Decoder | None, path: Path) -> None:
        self.strip_start = 0
        self._byte_level = False
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        for step in _flatten(None if decoder is None else json.loads(decoder.__getstate__()), path):
            kind = step.get("type")
            pattern = step.get("pattern")
            if kind == "ByteLevel":
                self._byte_level = True
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Metaspace":
                self._replacements.append((str(step.get("replacement", "▁")), " "))
                if step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True):
                    self.strip_start = 1
            elif kind == "Replace" and isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
                self._replacements.append((pattern["String"], str(step.get("content", ""))))
            elif kind == "Strip" and step.get("content") == " " and step.get("stop") == 0:
                self.strip_start = int(step.get("start", 0))
            elif kind != "Fuse":
                raise UnsupportedModelError(
                    f"{path}: the decoder {kind!r} is not supported.",
                    hint="Byte-level BPE and SentencePiece tokenizers are.",
                )
        if self._byte_level and (self._byte_fallback or self._replacements or self.strip_start):
            raise UnsupportedModelError(f"{path}: ByteLevel is combined with other decoders, which is not supported.")

    def bytes_of(self, token: str) -> bytes:
        """Return the bytes of a token's vocabulary text."""
        if self._byte_level:
            mapped = [_BYTE_OF_CHAR.get(char) for char in token]
            if None in mapped:  # an added token, whose text is plain
                return token.encode("utf-8", "replace")
            return bytes(byte for byte in mapped if byte is not None)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # not a byte after all: plain text
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode("utf-8", "replace")


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """Return a JSON object from a file of an untrusted folder; None when there is no such file.

    Raises:
        CheckpointError: the file is unreadable, larger than `max_bytes`, not JSON, or not an object.
    """
    text = read_text(path, max_bytes)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path} is not valid JSON: {cause}.", hint="Fetch the file again.") from cause
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def read_text(path: Path, max_bytes: int) -> str | None:
    """Return a UTF-8 file of an untrusted folder; None when there is no such file.

    Raises:
        CheckpointError: it is no plain file, unreadable, larger than `max_bytes`, or not UTF-8.
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file.")
        size_bytes = path.stat().st_size
        if size_bytes > max_bytes:
            raise CheckpointError(f"{path} has {size_bytes} bytes; the limit is {max_bytes}.")
        return path.read_text(encoding="utf-8")
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror}.") from cause
    except UnicodeDecodeError as cause:
        raise CheckpointError(f"{path} is not UTF-8: {cause}.") from cause


def _build(text: str, path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
        # A file may ask for these, and would then cut or pad prompts silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except BaseException as cause:
        # The library raises plain Exception for bad content, and its Rust code panics as a BaseException.
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{path} is not a tokenizer: {str(cause)[:500]}.", hint="Fetch the file again."
        ) from cause
    return tokenizer


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return the same pipeline, to which markers are ordinary text. It shares the vocabulary's memory."""
    plain = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    plain.add_tokens([AddedToken(_STAND_IN, normalized=False)])
    return plain


def utf8_length(text: str) -> int:
    """Return the text's bytes in UTF-8.

    Raises:
        InvalidRequestError: the text holds a lone surrogate.
    """
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as cause:
        raise InvalidRequestError("The text holds a lone surrogate, which is no Unicode character.") from cause


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, with_offsets: bool) -> Encoding:
    utf8_length(text)
    # The library's `encode` holds Python's global lock all the while, which would stop every other thread; its
    # batches, even of one text, let go of it. Without offsets they take half the time.
    encode = tokenizer.encode_batch if with_offsets else tokenizer.encode_batch_fast
    try:
        return encode([text], add_special_tokens=add_special_tokens)[0]
    except Exception as cause:
        raise InvalidRequestError(f"The tokenizer cannot encode this text: {str(cause)[:200]}.") from cause


def _missing(folder: Path) -> CheckpointError:
    if (folder / "tokenizer.model").exists():
        return CheckpointError(
            f"{folder} has tokenizer.model but no {_TOKENIZER_JSON}.",
            hint="Convert it once: transformers' AutoTokenizer.from_pretrained(A).save_pretrained(B).",
        )
    return CheckpointError(f"{folder / _TOKENIZER_JSON} is missing.", hint="Fetch it from where the weights came from.")


def _flatten(raw: Any, path: Path) -> list[dict[str, Any]]:
    """Return the steps of a decoder, nested sequences opened."""
    if not isinstance(raw, dict):
        raise UnsupportedModelError(f"{path} has no decoder.", hint="Word-level tokenizers are not supported.")
    if raw.get("type") != "Sequence":
        return [raw]
    return [step for child in raw.get("decoders", []) for step in _flatten(child, path)]


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in byte-level BPE's alphabet.

    Printable bytes of Latin-1 stand for themselves, the others for characters from U+0100 on, in order
    (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHAR = _byte_alphabet()
