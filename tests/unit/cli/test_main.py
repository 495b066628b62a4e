"""The edge: help that loads nothing, errors that are kind, exit codes that scripts can rely on."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from seamount.cli import main as edge
from seamount.cli.main import COMMANDS, command_parser, main
from seamount.core.errors import (
    BackendError,
    CheckpointError,
    ContextTooLongError,
    EngineError,
    OutOfMemoryError,
    SeamountError,
)
from seamount.version import __version__

HEAVY = ("torch", "numpy", "fastapi", "uvicorn", "pydantic", "rich", "prompt_toolkit", "httpx", "tokenizers", "asyncio")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["version"], ["version", "--json"], ["sreve"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from seamount.cli.main import main\n"
        f"main({arguments!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["chat", "generate", "serve", "eval", "inspect", "bench", "quantize", "merge"])
def test_the_help_of_no_command_loads_what_only_running_it_needs(command: str) -> None:
    program = (
        "import sys\n"
        "from seamount.cli.main import command_parser\n"
        f"command_parser({command!r}).format_help()\n"
        f"print([name for name in {set(HEAVY) - {'pydantic', 'asyncio'}!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: seamount {command}" in shown
    assert "examples:" in shown


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_examples_of_every_command_are_valid_command_lines(command: str) -> None:
    import shlex

    parser = command_parser(command)
    lines = [line.partition("| ")[2] or line for line in (parser.epilog or "").splitlines()[1:]]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["seamount", command]
        parser.parse_args(words[2:])


@pytest.mark.parametrize("action", ["add", "list", "revoke"])
def test_what_is_said_of_an_action_can_be_run(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", action, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: seamount keys {action} [-h]")
    assert main(["keys", action, "--database"]) == 2
    assert f"hint: `seamount keys {action} --help` lists the flags." in capsys.readouterr().err


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name}" in shown for name in COMMANDS)


def test_no_arguments_show_the_overview_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: seamount COMMAND" in capsys.readouterr().out


def test_a_misspelt_command_gets_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sreve"]) == 2
    assert capsys.readouterr().err == "error: There is no command 'sreve'.\nhint: Did you mean `seamount serve`?\n"


@pytest.mark.parametrize("arguments", [["serve", "--port", "eighty"], ["serve", "--prot", "1"], ["generate"]])
def test_wrong_flags_are_told_in_one_line_with_a_hint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2
    assert shown[0].startswith("error: ")
    assert shown[1] == f"hint: `seamount {arguments[0]} --help` lists the flags."


def test_the_version_is_told_to_people_and_to_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"seamount {__version__}\n"
    assert main(["version", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["seamount"] == __version__
    assert facts["packages"]["torch"].startswith("2.")


class _Failing:
    """A command that fails with whatever it is given."""

    DESCRIPTION = EXAMPLES = ARGUMENTS = ""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def add_arguments(self, parser: Any) -> None:
        """Has none."""

    def run(self, args: Any) -> int:
        raise self._error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("m", hint="h"), 2),
        (ContextTooLongError("m", hint="h"), 2),
        (OutOfMemoryError("m", hint="h"), 1),
        (EngineError("m", hint="h"), 1),
        (BackendError("m", hint="h"), 1),
    ],
)
def test_typed_errors_become_a_message_a_hint_and_a_code(
    error: SeamountError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(edge, "_load", lambda name: _Failing(error))
    assert main(["version"]) == code
    assert capsys.readouterr().err == "error: m\nhint: h\n"


def test_ctrl_c_shows_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(edge, "_load", lambda name: _Failing(KeyboardInterrupt()))
    assert main(["version"]) == 130
    assert capsys.readouterr().err.strip() == ""


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ModuleNotFoundError("No module named 'fastapi'", name="fastapi.responses")
    monkeypatch.setattr(edge, "_load", lambda name: _Failing(missing))
    assert main(["version"]) == 2
    assert "pip install 'seamount[serve]'" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m seamount version --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")  # 0 where the reader was slower to leave than the writer to end


@pytest.mark.parametrize("arguments", ["--help", "version", "version --help"])
def test_output_that_cannot_be_written_is_told(arguments: str) -> None:
    command = f"{sys.executable} -m seamount {arguments} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: The output could not be written: No space left on device.\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii:surrogateescape"])
@pytest.mark.parametrize(
    "command", [["generate", "/no/such/folder", "--prompt", "-"], ["chat", "--url", "http://x/v1"]]
)
def test_input_that_is_not_utf_8_is_refused(
    command: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, errors = encoding.partition(":")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), name, errors or "strict"))
    monkeypatch.setattr("seamount.cli.wire.open_backend", lambda args: nullcontext(SimpleNamespace(name="m")))
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: stdin is not UTF-8.\nhint: ")


def test_an_unknown_skill_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "/no/such/folder", "--skills", "arithmetic,nope"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no skill 'nope'.\nhint: There are: arithmetic")
