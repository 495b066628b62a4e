"""What occurred is remembered over its settling; scripts tell languages apart where they can."""

from __future__ import annotations

import pytest

from seamount.training.examples import seen
from seamount.training.examples.languages import wrong_language
from seamount.training.examples.seen import Seen


def test_first_places_are_remembered_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_RECENT", 7)
    found = Seen()
    keys = [str(number).encode() for number in range(200)]
    assert [found.first(key, place) for place, key in enumerate(keys)] == [None] * 200
    assert [found.first(key, 999) for key in keys] == list(range(200))
    assert found.first(b"other", 5) is None


@pytest.mark.parametrize(
    ("text", "language", "script"),
    [
        ("The weather is fine today.", "en", None),
        ("The weather is fine today.", "de", None),
        ("The weather is fine today.", "zh", "Latin"),
        ("今天天气很好，我们走吧。", "zh", None),
        ("今天天气很好，我们走吧。", "en", "Han"),
        ("用 Python 写: print(x), 然后运行这个程序看看结果。", "zh", None),
        ("今日はとても良い天気ですね。", "ja", None),
        ("今日はとても良い天気ですね。", "zh", "Kana"),
        ("Сегодня хорошая погода.", "ru", None),
        ("Сегодня хорошая погода.", "en", "Cyrillic"),
        ("42", "zh", None),
        ("", "en", None),
    ],
)
def test_scripts(text: str, language: str, script: str | None) -> None:
    assert wrong_language(text, language) == script
