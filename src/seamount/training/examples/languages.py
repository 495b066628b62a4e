"""Whether a text is in the script of the language that it should be in: `in_language`.

Called by `stream` and by `shards.scan`, and only where a language is expected. Looks at letters alone: it tells Chinese
from English and not German from English.
"""

from __future__ import annotations

import re
from dataclasses import replace

from seamount.core.errors import ConfigError

from .formats import Format
from .record import Record
from .sample import Sample

_LETTERS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Kana": "\u3040-\u30ff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7af",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
_LATIN = ("cs", "da", "de", "en", "es", "fi", "fr", "hu", "id", "it", "nl", "no", "pl", "pt", "ro", "sv", "tr", "vi")
_SCRIPTS = {
    **dict.fromkeys(_LATIN, ("Latin",)),
    "zh": ("Han",),
    "ja": ("Kana", "Han"),
    "ko": ("Hangul",),
    **dict.fromkeys(("ru", "uk", "bg", "sr"), ("Cyrillic",)),
    "el": ("Greek",),
    **dict.fromkeys(("ar", "fa", "ur"), ("Arabic",)),
    "he": ("Hebrew",),
    "hi": ("Devanagari",),
    "th": ("Thai",),
}
_PATTERNS = {name: re.compile(f"[{letters}]") for name, letters in _LETTERS.items()}
_DENSE = ("Han", "Kana", "Hangul")
_DENSE_WEIGHT = 3  # a character of these says about as much as three letters
_FEWEST_LETTERS = 12
_SHARE = 0.5


def check_language(language: str) -> None:
    """Refuse a language whose script is not known.

    Raises:
        ConfigError: names those that are.
    """
    if language not in _SCRIPTS:
        raise ConfigError(
            f"The language {language[:40]!r} cannot be checked.", hint=f"Known are {', '.join(sorted(_SCRIPTS))}."
        )


def in_language(form: Format, language: str) -> Format:
    """The format, and records in which the assistant's words are mostly in another language's script are broken.

    Raises:
        ConfigError: see `check_language`.
    """
    check_language(language)

    def read(record: Record) -> Sample:
        sample = form.read(record)
        script = wrong_language(sample.learned_text(), language)
        if script is not None:
            field = sample.fields[-1] if sample.fields else "text"
            raise sample.error(field, f"is mostly in {script} letters, and {language} is expected")
        return sample

    return replace(form, read=read)


def wrong_language(text: str, language: str) -> str | None:
    """Return the script that most of a text is in, if not in the language's; None also for too few letters to say."""
    counts = {
        name: len(pattern.findall(text)) * (_DENSE_WEIGHT if name in _DENSE else 1)
        for name, pattern in _PATTERNS.items()
    }
    total = sum(counts.values())
    if total < _FEWEST_LETTERS or sum(counts[name] for name in _SCRIPTS[language]) >= _SHARE * total:
        return None
    return max(counts, key=lambda name: counts[name])
