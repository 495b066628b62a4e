"""`seamount generate`: continue one prompt, or answer it, and print the text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import SamplingParams

from . import flags, wire
from .backends import interrupted_between
from .screen import TerminalAnswer, harmless, utf8_input

if TYPE_CHECKING:
    from seamount.core.requests import EngineStats
    from seamount.engine.llm import LLM, Delta

DESCRIPTION = """Continue a prompt and print the text as it comes. The prompt is raw text, special tokens included; with
--chat it is a question, put through the model's chat template; reasoning is then dimmed on a terminal, and goes to
stderr where stdout is a pipe or a file."""
ARGUMENTS = "[MODEL] --prompt TEXT [FLAGS]"
EXAMPLES = """  seamount generate --prompt "What is Seamount?" --chat
  seamount generate /models/folder --prompt "Once upon a time" --max-tokens 64 --seed 1
  cat prompt.txt | seamount generate --prompt - --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    flags.add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="answer the prompt as a question")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each continuation, with token ids")
    flags.add_sampling_flags(parser)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    given = flags.sampling_given(args)
    SamplingParams(**given)  # before a model is loaded for minutes
    prompt = _stdin() if args.prompt == "-" else args.prompt
    if not prompt:
        raise InvalidRequestError("The prompt is empty.", param="prompt")
    llm = wire.open_llm(flags.settings_from(args).engine)
    sampling = SamplingParams(**{**llm.prompt_encoder.default_sampling, **given})
    if args.json or sampling.n > 1:
        _print_all(llm, prompt, sampling, chat=args.chat, as_json=args.json)
    else:
        _print_stream(_stream(llm, prompt, sampling, chat=args.chat), chat=args.chat)
    _tell_guesses(llm.stats())
    return 0


def _stdin() -> str:
    with utf8_input():
        text = sys.stdin.read()
        text.encode()  # where the locale is C, Python lets other bytes through as lone surrogates
    return text


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _stream(llm: LLM, prompt: str, sampling: SamplingParams, *, chat: bool) -> Iterator[Delta]:
    return llm.stream_chat(_messages(prompt), sampling) if chat else llm.stream(prompt, sampling)


def _print_stream(deltas: Iterator[Delta], *, chat: bool) -> None:
    answer = _answer(chat=chat)
    with closing(interrupted_between(deltas)) as pieces:
        for delta in pieces:
            answer.show(*((delta.reasoning, delta.content) if chat else ("", delta.text)))
    answer.end()


def _print_all(llm: LLM, prompt: str, sampling: SamplingParams, *, chat: bool, as_json: bool) -> None:
    completions = llm.chat(_messages(prompt), sampling) if chat else llm.generate(prompt, sampling)
    answer = _answer(chat=chat)
    for completion in completions:
        if as_json:
            print(json.dumps({"model": llm.facts.name, **asdict(completion)}, ensure_ascii=False))
        else:
            reasoning, content = (completion.reasoning or "", completion.content) if chat else ("", completion.text)
            answer.show(reasoning, f"[{completion.index}] {content}")
            answer.end()


def _tell_guesses(stats: EngineStats) -> None:
    """Say on stderr how speculative decoding fared, where it guessed at all."""
    if stats.num_draft_tokens:
        share = stats.num_accepted_tokens / stats.num_draft_tokens
        print(
            f"Guessed ahead: {stats.num_accepted_tokens} of {stats.num_draft_tokens} tokens right ({share:.0%}), "
            f"{stats.num_generated_tokens} tokens in {stats.num_steps} steps",
            file=sys.stderr,
        )


class _PlainAnswer:
    """The content on stdout, byte for byte into a pipe; the reasoning on stderr, where it mixes with nothing."""

    def __init__(self) -> None:
        self._in_reasoning = False

    def show(self, reasoning: str, content: str) -> None:
        """Write what the answer grew by."""
        if reasoning:
            sys.stderr.write(harmless(reasoning))
            sys.stderr.flush()
            self._in_reasoning = True
        if content:
            self._end_reasoning()
            sys.stdout.write(harmless(content) if sys.stdout.isatty() else content)
            sys.stdout.flush()

    def end(self) -> None:
        """End the last line."""
        self._end_reasoning()
        sys.stdout.write("\n")

    def _end_reasoning(self) -> None:
        if self._in_reasoning:
            sys.stderr.write("\n")
        self._in_reasoning = False


def _answer(*, chat: bool) -> TerminalAnswer | _PlainAnswer:
    """Return where an answer is shown; raw text has no parts."""
    if not chat or not sys.stdout.isatty():
        return _PlainAnswer()
    from rich.console import Console

    return TerminalAnswer(Console(highlight=False, markup=False, emoji=False))
