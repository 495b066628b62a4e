"""`seamount chat`: a conversation in the terminal, with a model in this process or with a running server.

Reads from a `Screen`, asks a `ChatBackend`, and knows neither torch nor HTTP.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seamount.core.errors import ConfigError, InvalidRequestError, SeamountError
from seamount.core.sampling import SamplingParams

from . import flags, wire
from .backends import ChatBackend
from .conversation import Conversation, Turn
from .screen import Screen

DESCRIPTION = """Chat in the terminal. Ctrl-C stops the answer and not the program, Ctrl-D leaves, /help lists the
commands; Alt+Enter or a backslash at the end of a line makes a new line. From a pipe, each line is a message, and the
answers' text goes to stdout."""
ARGUMENTS = "[MODEL] [FLAGS]"
EXAMPLES = """  seamount chat
  seamount chat /models/folder --temperature 0
  seamount chat --url http://127.0.0.1:8000/v1
  echo "What can you do?" | seamount chat"""

SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")

_THINK = {"on": True, "off": False, "default": None}
_HELP = """/help          this list
/system TEXT   set the system prompt; without TEXT: take it away
/clear         forget the conversation
/retry         ask the last question again
/think on|off  let the model reason before it answers, where its template has the switch; /think default unsets it
/params        show the sampling parameters; /params temperature=0.2 sets one, /params temperature= unsets it
/save FILE     write the conversation to a new file: Markdown, or JSON where the name ends in .json
/exit          leave, as Ctrl-D does
A message that begins with a slash is sent by doubling it: //like this."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    flags.add_model(parser)
    parser.add_argument("--url", metavar="URL", help="talk to this server's API base; MODEL is then a name it serves")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="let the model reason before it answers, where its template has the switch",
    )
    parser.add_argument("--no-history", action="store_true", help="do not keep typed lines in the history file")
    flags.add_sampling_flags(parser, SAMPLING)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends."""
    sampling = flags.sampling_given(args)
    SamplingParams(**sampling)  # before a model is loaded for minutes
    commands = tuple(f"/{name}" for name in COMMANDS)
    screen = wire.open_screen(keep_history=not args.no_history, commands=commands)
    with wire.open_backend(args) as backend:
        options = Options(sampling=sampling, think=args.think)
        if screen.keeps_going:
            screen.note(f"{backend.name}. /help lists the commands.")
        Chat(backend, screen, Conversation(system=args.system), options).run()
    return 0


@dataclass
class Options:
    """What a person can change between answers: sampling parameters chosen, and the reasoning switch (None: unset)."""

    sampling: dict[str, Any] = field(default_factory=dict)
    think: bool | None = None


class Chat:
    """The loop: a line is a command or a question; a question is answered piece by piece."""

    def __init__(self, backend: ChatBackend, screen: Screen, conversation: Conversation, options: Options) -> None:
        self._backend = backend
        self._screen = screen
        self.conversation = conversation
        self.options = options

    def run(self) -> None:
        """Serve lines until their end or `/exit`.

        Raises:
            SeamountError: something failed on a screen that does not keep going.
        """
        for line in self._screen.lines():
            try:
                if not self._take(line):
                    return
            except SeamountError as error:
                self._screen.error(error)
            except KeyboardInterrupt:  # pressed just before an answer began, or just after its end
                if not self._screen.keeps_going:
                    raise
                self._screen.note("stopped")

    def _take(self, line: str) -> bool:
        """Act on one line; return False to leave."""
        text = line.strip()
        if not text:
            return True
        if not text.startswith("/") or text.startswith("//"):
            self.ask(text.removeprefix("/") if text.startswith("//") else text)
            return True
        name, _, rest = text[1:].partition(" ")
        if name not in COMMANDS:
            raise InvalidRequestError(f"There is no command /{name}.", hint="/help lists the commands.")
        if name == "exit":
            return False
        COMMANDS[name](self, rest.strip())
        return True

    def ask(self, question: str) -> None:
        """Ask, show the answer as it comes, and keep the turn. Ctrl-C ends the answer; what came of it is kept.

        Raises:
            SeamountError: the answer failed; the part that came is kept.
        """
        turn = Turn(question)
        started = time.monotonic()
        first: float | None = None
        num_tokens = 0
        finish_reason: str | None = None
        messages = self.conversation.messages(question)
        stream = self._backend.stream(messages, self.options.sampling, self.options.think)
        try:
            with closing(stream):
                for piece in stream:
                    if first is None and (piece.num_tokens or piece.reasoning or piece.content):
                        first = time.monotonic()
                    num_tokens += piece.num_tokens
                    finish_reason = piece.finish_reason or finish_reason
                    turn.reasoning += piece.reasoning
                    turn.content += piece.content
                    self._screen.answer(piece.reasoning, piece.content)
        except KeyboardInterrupt:
            if not self._screen.keeps_going:
                raise
            turn.stopped = True
            finish_reason = "stopped"
        finally:
            self.conversation.add(turn)
        self._screen.end_answer(summary(started, first, time.monotonic(), num_tokens, finish_reason))

    def help(self, rest: str) -> None:
        """Show the commands."""
        self._screen.note(_HELP)

    def system(self, text: str) -> None:
        """Set or take away the system prompt."""
        self.conversation.system = text or None
        self._screen.note("The system prompt is set." if text else "There is no system prompt now.")

    def clear(self, rest: str) -> None:
        """Forget the turns."""
        self.conversation.clear()
        self._screen.note("The conversation is forgotten.")

    def retry(self, rest: str) -> None:
        """Ask the last question again."""
        question = self.conversation.take_back()
        if question is None:
            raise InvalidRequestError("There is no question to ask again.")
        self.ask(question)

    def think(self, word: str) -> None:
        """Set the reasoning switch."""
        if word not in _THINK:
            raise InvalidRequestError("/think needs on, off or default.")
        self.options.think = _THINK[word]
        self._screen.note(f"Reasoning: {word}.")

    def params(self, text: str) -> None:
        """Show, set or unset sampling parameters."""
        changed = dict(self.options.sampling)
        for assignment in text.split():
            name, _, value = assignment.partition("=")
            if name not in SAMPLING:
                raise InvalidRequestError(f"There is no parameter {name}.", hint=f"There are: {', '.join(SAMPLING)}.")
            changed.pop(name, None)
            if value:
                changed[name] = flags.sampling_value(name, value)
        SamplingParams(**changed)
        self.options.sampling = changed
        chosen = ", ".join(f"{name}={value}" for name, value in changed.items())
        self._screen.note(chosen or "All parameters are as the model recommends.")

    def save(self, name: str) -> None:
        """Write the conversation to a new file."""
        if not name:
            raise InvalidRequestError("/save needs a file name.")
        path = Path(name).expanduser()
        text = self.conversation.to_json() if path.suffix == ".json" else self.conversation.to_markdown()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as cause:
            raise ConfigError(f"{path} is there already.", hint="Give another name; nothing was written.") from cause
        except OSError as cause:
            raise ConfigError(f"{path} cannot be written: {cause.strerror}.") from cause
        self._screen.note(f"Saved to {path}.")


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": Chat.help,
    "system": Chat.system,
    "clear": Chat.clear,
    "retry": Chat.retry,
    "think": Chat.think,
    "params": Chat.params,
    "save": Chat.save,
    "exit": lambda chat, rest: None,
}


def summary(started_s: float, first_s: float | None, ended_s: float, num_tokens: int, finish_reason: str | None) -> str:
    """Return the line under an answer: tokens, speed after the first token, time to it, and an end that is unusual."""
    parts = []
    if num_tokens:
        parts.append(f"{num_tokens} tokens")
    if first_s is not None and num_tokens > 1 and ended_s > first_s:
        parts.append(f"{(num_tokens - 1) / (ended_s - first_s):.1f} tokens/s")
    if first_s is not None:
        parts.append(f"first token after {first_s - started_s:.2f} s")
    ends = {"length": "cut off at the length limit", "stopped": "stopped", "abort": "ended by the server"}
    if finish_reason in ends:
        parts.append(ends[finish_reason])
    return " · ".join(parts)
