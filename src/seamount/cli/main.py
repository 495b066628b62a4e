"""The `seamount` command: chooses the subcommand, and is the edge where errors become messages and exit codes.

Must stay light: `--help` and `version` import neither torch nor pydantic. A subcommand's module is imported only when
it is chosen, and builds its own flags then.

Exit codes: 0 done; 1 failed; 2 a flag, a setting, a folder or a request is wrong; 130 Ctrl-C; 141 the reader went away.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

from seamount.core.errors import ConfigError, RequestError, SeamountError
from seamount.version import __version__

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

COMMANDS = {
    "serve": "start the server: chat page and OpenAI API",
    "init": "make the first administrator's key: from then on, servers ask for keys",
    "keys": "add, list and revoke API keys",
    "cert": "make TLS certificates, for those who have no authority that does",
    "chat": "chat in the terminal",
    "generate": "continue a prompt and print the text",
    "inspect": "say what a checkpoint is, without loading its weights",
    "tune": "tune a model on your own examples",
    "versions": "list the versions of a run of tasks, go back to one, write one out",
    "distill": "train a small model to guess as a large one does",
    "eval": "score a model on held-out items, skill by skill",
    "merge": "add an adapter to its model: a new checkpoint",
    "data": "check training data, and show what of it would be learned",
    "quantize": "make a checkpoint of 4 or 8 bits per weight",
    "bench": "measure speed, latency and memory, against what the machine can do",
    "version": "print the version",
}

FAILED, WRONG, INTERRUPTED, READER_GONE = 1, 2, 130, 141

# Of a write to a stream; an error with a file name is about something else.
_OUTPUT_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_EXTRAS = {
    **dict.fromkeys(("fastapi", "uvicorn", "httpx", "prometheus_client", "pg8000", "cryptography"), "serve"),
    "yaml": "train",
    "pyarrow": "train",
    "opentelemetry": "tracing",
}


class Command(Protocol):
    """What a subcommand's module holds."""

    DESCRIPTION: str
    ARGUMENTS: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it, and return the exit code."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the arguments after the program's name; None reads those of the process.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except SeamountError as error:
        print_error(error)
        return WRONG if isinstance(error, ConfigError | RequestError) else FAILED
    except KeyboardInterrupt:
        print("", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return READER_GONE
    except OSError as error:
        if error.errno not in _OUTPUT_FAILURES or error.filename is not None:
            raise
        _drop_output()
        print_error(SeamountError(f"The output could not be written: {error.strerror}."))
        return FAILED
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        hint = f"Install them with: pip install 'seamount[{extra}]'"
        print_error(ConfigError(f"This command needs the packages of the extra {extra!r}.", hint=hint))
        return WRONG


def print_error(error: SeamountError) -> None:
    """Print an error, where it is and its hint on stderr, one line each."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.private:
        print(f"where: {error.private}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def _drop_output() -> None:
    """Let what is still buffered go nowhere: it would fail again, loudly, when the interpreter flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in the same words as every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.", hint=f"`{self.prog} --help` lists the flags.")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help to stdout; a failure to write is raised, so that `main` tells it."""
        sys.stdout.write(self.format_help())
        sys.stdout.flush()


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of one subcommand, with all its flags."""
    module = _load(name)
    parser = _Parser(
        prog=f"seamount {name}",
        usage=f"%(prog)s {module.ARGUMENTS}",
        description=module.DESCRIPTION,
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.set_defaults(command=name)  # for messages
    return parser


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        args = command_parser(argv[0]).parse_args(argv[1:])
        return _load(argv[0]).run(args)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else WRONG
    if argv[0] in ("-V", "--version"):
        print(f"seamount {__version__}")
        return 0
    near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"Did you mean `seamount {near[0]}`?" if near else "`seamount --help` lists the commands."
    raise ConfigError(f"There is no command {argv[0]!r}.", hint=hint)


def _load(name: str) -> Command:
    return cast(Command, import_module(f"{__package__}.{name}"))


def _overview() -> str:
    commands = "\n".join(f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items())
    return f"""Seamount {__version__}: the private DeepSeek stack. Runs DeepSeek models on hardware you own.

usage: seamount COMMAND [ARGUMENTS]

commands:
{commands}

examples:
  seamount serve                                chat with the embedded model at http://127.0.0.1:8000/
  seamount serve --port 18080 /models/folder    serve a checkpoint from disk
  seamount chat                                 chat right here

`seamount COMMAND --help` explains one command. Settings may also stand in the environment
(SEAMOUNT_ENGINE__DTYPE=float32) or in a TOML file (the one that SEAMOUNT_CONFIG names)."""
