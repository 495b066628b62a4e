"""The tokenizer inside a GGUF file, as the two JSON files that the rest of Seamount reads tokenizers from.

Called where a .gguf is opened for prompts; `models.tokenizer` and `models.prompt` take what comes out. Byte-level BPE
only: the file names how text is split before merging (`tokenizer.ggml.pre`), and the patterns here are those of the
tokenizers that the names stand for. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seamount.core.errors import CheckpointError, UnsupportedModelError

from .checkpoint import shown
from .fields import Fields
from .gguf import Gguf

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type
_MOST = 2**31

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Letters with upper and lower case, as of the Unicode version that DeepSeek-LLM's tokenizer was made with.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DIGITS = ""  # stands for splitting digit by digit, which the library has a step for


@dataclass(frozen=True)
class _Splitting:
    """How one `tokenizer.ggml.pre` prepares text.

    Attributes:
        patterns: applied one after the other; what matches, and what lies between, is split off.
        composes: text is brought to Unicode's composed form (NFC) first.
        whole_words: a word that is a token is taken whole, whatever its merges would give; such tokenizers also put
            the beginning-of-sequence token in front unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    composes: bool = False
    whole_words: bool = False


_QWEN_SPLITTING = _Splitting((_QWEN,), composes=True)
_LLAMA3_SPLITTING = _Splitting((_LLAMA3,), whole_words=True)
_SPLITTINGS = {
    "qwen2": _QWEN_SPLITTING,
    "deepseek-r1-qwen": _QWEN_SPLITTING,
    "llama-bpe": _LLAMA3_SPLITTING,
    "llama-v3": _LLAMA3_SPLITTING,
    "llama3": _LLAMA3_SPLITTING,
    "deepseek-llm": _Splitting(
        (
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _EAST_ASIAN,
            _DIGITS,
        )
    ),
    "deepseek-coder": _Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _DIGITS)),
    "deepseek-v3": _Splitting(
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "gpt-2": _Splitting((_GPT2,)),
    "default": _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


@dataclass(frozen=True)
class TokenizerFiles:
    """What a checkpoint folder's files would hold.

    Attributes:
        tokenizer: tokenizer.json, for `tokenizers.Tokenizer.from_str` once dumped.
        tokenizer_config: tokenizer_config.json: named tokens, add_bos_token and chat_template, those that there are.
    """

    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]


def tokenizer_files(file: Gguf) -> TokenizerFiles:
    """Return the tokenizer of a GGUF file.

    Raises:
        CheckpointError: the vocabulary is missing or contradicts itself.
        UnsupportedModelError: it is no byte-level BPE, or of a splitting that is not known.
    """
    fields = Fields(file.metadata, str(file.path))
    model = fields.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise UnsupportedModelError(
            f"{file.path}: the tokenizer {shown(model)} is not supported.",
            hint="Byte-level BPE (gpt2) is. Give a folder with tokenizer.json instead.",
        )
    name = fields.text("tokenizer.ggml.pre", "default")
    splitting = _SPLITTINGS.get(name)
    if splitting is None:
        raise UnsupportedModelError(
            f"{file.path}: the tokenizer splits text by the rules of {shown(name)}, which are not known here.",
            hint=f"Known are: {', '.join(_SPLITTINGS)}.",
        )
    tokens = _texts(fields, "tokenizer.ggml.tokens")
    vocab, added = _vocabulary(fields, tokens)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if splitting.composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _pre_tokenizers(splitting.patterns)},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitting.whole_words,
            "vocab": vocab,
            "merges": _merges(fields),
        },
    }
    return TokenizerFiles(tokenizer, _tokenizer_config(fields, tokens, adds_bos=splitting.whole_words))


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _pre_tokenizers(patterns: Sequence[str]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        if pattern != _DIGITS
        else {"type": "Digits", "individual_digits": True}
        for pattern in patterns
    ]
    return [*steps, _BYTE_LEVEL]


def _vocabulary(fields: Fields, tokens: list[str]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Ids by text, and the entries of tokens that are found before splitting. Fillers are left out."""
    kinds = fields.raw.get("tokenizer.ggml.token_type")
    types = [1] * len(tokens) if kinds is None else getattr(kinds, "tolist", list)()
    if len(types) != len(tokens):
        raise CheckpointError(f"{fields.where} has {len(tokens)} tokens, and types of {len(types)}.")
    vocab: dict[str, int] = {}
    added = []
    for token_id, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _UNUSED:
            continue
        if text in vocab:
            raise CheckpointError(f"{fields.where} has the token {shown(text)} twice: {vocab[text]} and {token_id}.")
        vocab[text] = token_id
        if kind in (_CONTROL, _USER_DEFINED) and text:
            entry = {"id": token_id, "content": text, "special": kind == _CONTROL and not _is_tool_marker(text)}
            added.append({**entry, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False})
    return vocab, added


def _is_tool_marker(text: str) -> bool:
    """Whether a token opens or closes tool calls, and so is part of an answer's text.

    Converters declare every `<|...|>` a control token; DeepSeek's own tokenizers do not count these as special.
    """
    return "tool▁" in text


def _merges(fields: Fields) -> list[list[str]]:
    merges = []
    for merge in _texts(fields, "tokenizer.ggml.merges"):
        pair = merge.split(" ")
        if len(pair) != 2 or not all(pair):
            raise CheckpointError(f"{fields.where} has the merge {shown(merge)}, which is not of two parts.")
        merges.append(pair)
    return merges


def _tokenizer_config(fields: Fields, tokens: list[str], *, adds_bos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": fields.boolean("tokenizer.ggml.add_bos_token", default=adds_bos),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = fields.optional_integer(f"tokenizer.ggml.{key}_token_id", 0, _MOST)
        if token_id is None:
            continue
        if token_id >= len(tokens):
            raise CheckpointError(f"{fields.where}: the {name} token {token_id} is not among {len(tokens)} tokens.")
        config[f"{name}_token"] = tokens[token_id]
    templates = _templates(fields)
    return {**config, "chat_template": templates} if templates else config


def _templates(fields: Fields) -> str | list[dict[str, str]] | None:
    """The chat template, or where there are several, their names and texts."""
    default = fields.text("tokenizer.chat_template", "")
    if fields.raw.get("tokenizer.chat_templates") is None or not default:
        return default or None
    names = _texts(fields, "tokenizer.chat_templates")
    named = {name: fields.text(f"tokenizer.chat_template.{name}") for name in names}
    return [{"name": name, "template": text} for name, text in {**named, "default": default}.items()]


def _texts(fields: Fields, key: str) -> list[str]:
    value = fields.raw.get(key)
    if not isinstance(value, list):
        raise CheckpointError(f"{fields.where}: {key} must be a list of texts.")
    return value
