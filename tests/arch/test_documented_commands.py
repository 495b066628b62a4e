"""Every `make` and `seamount` command that the documents show exists and takes the flags that are shown with it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from seamount.cli.main import COMMANDS, command_parser
from seamount.training.skills.commands_facts import TOPICS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:make|seamount) [^`\n]+)`")


def commands_in(text: str) -> list[str]:
    """Return the command lines of the two programs: lines of code blocks, and code within sentences."""
    lines = [line.strip().removeprefix("$ ") for block in FENCED.findall(text) for line in block.splitlines()]
    found = [line.partition(" #")[0].strip() for line in lines if re.match(r"(make|seamount) \w", line)]
    return found + INLINE.findall(FENCED.sub("", text))


SHOWN = sorted({(path.name, command) for path in DOCUMENTS for command in commands_in(path.read_text("utf-8"))})
TAUGHT = sorted({("seamount-tiny", command) for (answer, _), _, _ in TOPICS for command in INLINE.findall(answer)})


@pytest.mark.parametrize(("source", "command"), SHOWN + TAUGHT)
def test_the_shown_command_exists(source: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert targets
        assert set(targets) <= make_targets()
        return
    assert words[1] in COMMANDS or words[1] in ("--help", "--version", "COMMAND")
    if words[1] in COMMANDS:
        arguments = [word for word in words[2:] if word not in ("--help", "...")]
        parser = command_parser(words[1])
        if words[2:] or words[1] == "version":
            parser.parse_args(_completed(words[1], arguments))


def _completed(command: str, arguments: list[str]) -> list[str]:
    """Prose may leave out what a command cannot do without."""
    if command == "generate" and "--prompt" not in arguments:
        return [*arguments, "--prompt", "x"]
    if command == "inspect" and all(word.startswith("-") for word in arguments):
        return [*arguments, "FOLDER"]
    if command == "data" and len(arguments) == 1:
        return [*arguments, "FILE", *(("--output", "FOLDER") if arguments == ["build"] else ())]
    return arguments


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {target for target in make_targets() if f"make {target}" not in listed} == set()


def test_commands_are_found_in_code_and_in_sentences() -> None:
    text = "Run `make serve`, or:\n```sh\n$ seamount chat --think  # talk\nls\n```\n"
    assert commands_in(text) == ["seamount chat --think", "make serve"]
