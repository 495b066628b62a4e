"""The terminal chat's loop over a scripted model and a screen that remembers."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from seamount.cli.backends import Piece
from seamount.cli.chat import COMMANDS, Chat, Options, summary
from seamount.cli.conversation import Conversation
from seamount.cli.screen import harmless
from seamount.core.errors import EngineError, SeamountError


class Memory:
    """A screen that plays lines and keeps what is shown."""

    def __init__(self, *lines: str, keeps_going: bool = True) -> None:
        self.keeps_going = keeps_going
        self._lines = lines
        self.shown: list[str] = []
        self.notes: list[str] = []
        self.errors: list[SeamountError] = []

    def lines(self) -> Iterator[str]:
        yield from self._lines

    def answer(self, reasoning: str, content: str) -> None:
        self.shown.append(f"({reasoning}){content}" if reasoning else content)

    def end_answer(self, summary: str) -> None:
        self.notes.append(summary)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def error(self, error: SeamountError) -> None:
        if not self.keeps_going:
            raise error
        self.errors.append(error)


class Scripted:
    """A backend that plays pieces, or raises what stands among them."""

    name = "scripted"

    def __init__(self, *answers: Sequence[Piece | BaseException]) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[list[Mapping[str, str]], dict[str, Any], bool | None]] = []

    def stream(
        self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], think: bool | None
    ) -> Generator[Piece, None, None]:
        self.asked.append((list(messages), dict(sampling), think))
        for piece in self._answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def words(*texts: str) -> list[Piece | BaseException]:
    return [Piece(content=text, num_tokens=1) for text in texts]


def chat(screen: Memory, backend: Scripted, **options: Any) -> Chat:
    made = Chat(backend, screen, Conversation(), Options(**options))
    made.run()
    return made


def test_answers_stream_and_are_remembered() -> None:
    screen = Memory("hello", "", "again")
    backend = Scripted([Piece(reasoning="hm", num_tokens=1), *words("Hi", "!")], words("Yes"))
    chat(screen, backend)
    assert screen.shown == ["(hm)", "Hi", "!", "Yes"]
    assert screen.notes[0].startswith("3 tokens")
    assert [m["content"] for m in backend.asked[1][0]] == ["hello", "Hi!", "again"]


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    screen = Memory("long", "next")
    backend = Scripted([*words("part"), KeyboardInterrupt()], words("fine"))
    made = chat(screen, backend)
    assert screen.notes[0].endswith("stopped")
    assert [(t.content, t.stopped) for t in made.conversation.turns] == [("part", True), ("fine", False)]


def test_ctrl_c_ends_a_pipe() -> None:
    with pytest.raises(KeyboardInterrupt):
        chat(Memory("long", "next", keeps_going=False), Scripted([KeyboardInterrupt()]))


def test_an_error_is_shown_and_the_chat_goes_on() -> None:
    screen = Memory("boom", "next")
    chat(screen, Scripted([*words("pa"), EngineError("broke")], words("fine")))
    assert [error.message for error in screen.errors] == ["broke"]
    assert screen.shown[-1] == "fine"


def test_an_error_ends_a_pipe() -> None:
    with pytest.raises(EngineError):
        chat(Memory("boom", "next", keeps_going=False), Scripted([EngineError("broke")]))


def test_system_think_and_params_change_what_is_asked() -> None:
    screen = Memory("/system Be kind.", "/think off", "/params temperature=0.5 seed=3", "/params seed=", "hello")
    backend = Scripted(words("ok"))
    chat(screen, backend)
    messages, sampling, think = backend.asked[0]
    assert messages[0] == {"role": "system", "content": "Be kind."}
    assert sampling == {"temperature": 0.5}
    assert think is False


def test_retry_asks_again_with_the_answer_forgotten() -> None:
    backend = Scripted(words("no"), words("yes"))
    made = chat(Memory("q", "/retry"), backend)
    assert backend.asked[0][0] == backend.asked[1][0]
    assert [turn.content for turn in made.conversation.turns] == ["yes"]


def test_clear_forgets_and_exit_leaves() -> None:
    backend = Scripted(words("a"), words("b"))
    chat(Memory("one", "/clear", "two", "/exit", "three"), backend)
    assert [len(asked[0]) for asked in backend.asked] == [1, 1]


def test_a_doubled_slash_is_sent() -> None:
    backend = Scripted(words("a"))
    chat(Memory("//etc/hosts"), backend)
    assert backend.asked[0][0][0]["content"] == "/etc/hosts"


@pytest.mark.parametrize(
    "line",
    ["/nonsense", "/think maybe", "/params temperature=hot", "/params top_p=7", "/params x=1", "/retry", "/save"],
)
def test_wrong_commands_are_told_and_change_nothing(line: str) -> None:
    screen = Memory(line)
    made = chat(screen, Scripted())
    assert len(screen.errors) == 1
    assert made.options == Options()


def test_save_writes_a_new_file_and_never_over_an_old_one(tmp_path: Path) -> None:
    target = tmp_path / "talk.json"
    screen = Memory("hello", f"/save {target}", f"/save {target}", f"/save {tmp_path / 'talk.md'}", "/save /no/such/x")
    chat(screen, Scripted(words("Hi")))
    assert json.loads(target.read_text(encoding="utf-8"))[1]["content"] == "Hi"
    assert "**Answer**\n\nHi" in (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert ["is there already" in error.message for error in screen.errors] == [True, False]


def test_help_names_every_command() -> None:
    screen = Memory("/help")
    chat(screen, Scripted())
    assert all(f"/{name}" in screen.notes[0] for name in COMMANDS)


def test_the_summary_gives_speed_and_time_to_the_first_token() -> None:
    assert summary(0.0, 0.5, 2.5, 21, "stop") == "21 tokens · 10.0 tokens/s · first token after 0.50 s"
    assert summary(0.0, 0.5, 0.5, 1, "length") == "1 tokens · first token after 0.50 s · cut off at the length limit"
    assert summary(0.0, None, 1.0, 0, "stopped") == "stopped"


def test_a_model_cannot_steer_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\x07\x9bc\r\n\td é 中") == "a[2Jbc\n\td é 中"
