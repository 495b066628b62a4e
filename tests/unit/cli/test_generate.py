"""How `seamount generate --chat` keeps an answer's reasoning apart from its content."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from seamount.cli import generate
from seamount.engine.llm import Delta


def deltas() -> Iterator[Delta]:
    for text, reasoning, content in (("2+", "2+", ""), ("2</think>", "2", ""), ("F\x1bour", "", "F\x1bour")):
        yield Delta(index=0, text=text, reasoning=reasoning, content=content, token_ids=(1,))


def test_in_a_pipe_the_content_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    generate._print_stream(deltas(), chat=True)
    assert tuple(capsys.readouterr()) == ("F\x1bour\n", "2+2\n")


def test_raw_text_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    generate._print_stream(deltas(), chat=False)
    assert tuple(capsys.readouterr()) == ("2+2</think>F\x1bour\n", "")


def test_on_a_terminal_it_comes_first_and_controls_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    generate._print_stream(deltas(), chat=True)
    assert tuple(capsys.readouterr()) == ("2+2\n\nFour\n", "")
