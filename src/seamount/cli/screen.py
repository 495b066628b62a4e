"""What the terminal chat shows and reads: on a terminal with colours and editing, in a pipe as plain lines.

Used by `cli.chat` and `cli.generate`. Knows nothing of models. What a model writes is never let through as terminal
control.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from seamount.core.errors import InvalidRequestError, SeamountError

if TYPE_CHECKING:
    from rich.console import Console

# Every control character but newline and tab: escape sequences in a model's text could redraw or retitle the terminal.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def harmless(text: str) -> str:
    """Return the text without terminal control characters."""
    return text.translate(_CONTROL)


@contextmanager
def utf8_input() -> Iterator[None]:
    """Turn the failure to decode stdin into a typed error.

    Raises:
        InvalidRequestError: stdin is not UTF-8.
    """
    try:
        yield
    except UnicodeError as cause:
        raise InvalidRequestError("stdin is not UTF-8.", hint="Convert it first, for instance with iconv.") from cause


class Screen(Protocol):
    """Where a chat happens.

    Attributes:
        keeps_going: an error is shown and the chat goes on; else it ends the program.
    """

    keeps_going: bool

    def lines(self) -> Iterator[str]:
        """Yield what the person sends, until the end of input."""
        ...

    def answer(self, reasoning: str, content: str) -> None:
        """Show the next part of an answer."""
        ...

    def end_answer(self, summary: str) -> None:
        """Close the answer, with a line about it."""
        ...

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        ...

    def error(self, error: SeamountError) -> None:
        """Show what went wrong."""
        ...


class PipeScreen:
    """One line of stdin is one message; stdout gets the answers' content, byte for byte, and nothing else."""

    keeps_going = False

    def lines(self) -> Iterator[str]:
        """See `Screen`."""
        with utf8_input():
            for line in sys.stdin:
                line.encode()  # where the locale is C, Python lets other bytes through as lone surrogates
                yield line.rstrip("\r\n")

    def answer(self, reasoning: str, content: str) -> None:
        """See `Screen`; reasoning is left out."""
        if content:
            sys.stdout.write(content)
            sys.stdout.flush()

    def end_answer(self, summary: str) -> None:
        """See `Screen`; the summary is left out."""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """See `Screen`."""
        print(text, file=sys.stderr)

    def error(self, error: SeamountError) -> None:
        """See `Screen`: an error ends the program."""
        raise error


class TerminalAnswer:
    """Prints an answer's parts to a terminal as they come, the reasoning dimmed.

    Attributes:
        begun: something of an answer was shown, and its end was not told yet.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._part = ""

    @property
    def begun(self) -> bool:
        return bool(self._part)

    def show(self, reasoning: str, content: str) -> None:
        """Show what the answer grew by."""
        for part, text, style in (("reasoning", reasoning, "dim italic"), ("content", content, None)):
            if not text:
                continue
            if self._part == "reasoning" and part == "content":
                self._console.print("\n")
            self._part = part
            self._console.print(harmless(text), style=style, end="", soft_wrap=True)
        self._console.file.flush()

    def end(self) -> None:
        """End the answer's last line."""
        self._part = ""
        self._console.print()


class TerminalScreen:
    """Edits lines with prompt_toolkit and prints with rich.

    Args:
        history: file that keeps what was typed, readable by its owner only; None keeps nothing.
        commands: names that Tab completes.
    """

    keeps_going = True

    def __init__(self, history: Path | None, commands: tuple[str, ...]) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False, emoji=False)
        self._ask = _line_reader(history, commands)
        self._answer = TerminalAnswer(self._console)

    def lines(self) -> Iterator[str]:
        """See `Screen`. Ctrl-C drops the line that is being typed, Ctrl-D ends."""
        while True:
            try:
                yield self._ask()
            except KeyboardInterrupt:
                self.note("Ctrl-D or /exit leaves.")
            except EOFError:
                return

    def answer(self, reasoning: str, content: str) -> None:
        """See `Screen`; reasoning is dimmed."""
        self._answer.show(reasoning, content)

    def end_answer(self, summary: str) -> None:
        """See `Screen`."""
        self._answer.end()
        self.note(summary)

    def note(self, text: str) -> None:
        """See `Screen`."""
        self._console.print(harmless(text), style="dim", soft_wrap=True)

    def error(self, error: SeamountError) -> None:
        """See `Screen`."""
        if self._answer.begun:
            self.end_answer("")
        self._console.print(harmless(f"error: {error.message}"), style="red", soft_wrap=True)
        if error.hint:
            self.note(f"hint: {error.hint}")


def _line_reader(history: Path | None, commands: tuple[str, ...]) -> Callable[[], str]:
    """Return a function that reads one message: Enter sends; Alt+Enter, or a backslash at the end, makes a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    kept: History = InMemoryHistory()
    if history is not None:
        history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        history.touch(mode=0o600)
        kept = FileHistory(history)
    session: PromptSession[str] = PromptSession(
        history=kept,
        key_bindings=keys,
        multiline=True,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        prompt_continuation="  ",
    )
    return lambda: session.prompt("> ")
