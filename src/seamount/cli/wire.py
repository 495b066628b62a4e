"""The composition root: the one place where settings are read and ports meet their implementations.

Called by the commands. Everything heavy is imported inside the function that needs it, so that a command pays only for
what it uses: `chat --url` never loads torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from seamount.core.errors import ConfigError

from . import flags
from .progress import LoadingProgress

if TYPE_CHECKING:
    from fastapi import FastAPI

    from seamount.core.database import Database
    from seamount.core.settings import EngineConfig, ServerConfig, Settings
    from seamount.engine.llm import LLM
    from seamount.server.door.access import Access

    from .backends import ChatBackend
    from .screen import Screen


def open_llm(config: EngineConfig) -> LLM:
    """Load a model into this process, showing how far it is.

    Raises:
        SeamountError: it cannot be loaded.
    """
    from seamount.models.locate import locate_model

    locate_model(config.model)  # a wrong name is told at once, not after seconds of importing torch
    with LoadingProgress(config.model) as progress:
        from seamount.engine.llm import LLM

        return LLM(**config.model_dump(), on_progress=progress)


@contextmanager
def open_backend(args: argparse.Namespace) -> Iterator[ChatBackend]:
    """Return where a chat's answers come from: the server of `--url`, else the model in this process.

    Raises:
        SeamountError: the server does not answer, or the model cannot be loaded.
    """
    if args.url is not None:
        if refused := [name for name in _engine_flags_given(args) if name != "model"]:
            flag = "--" + refused[0].replace("_", "-")
            raise ConfigError(f"{flag} is for a model in this process; with --url the server's own settings hold.")
        from .remote import ServerBackend

        with closing(ServerBackend(args.url, args.model, flags.settings_from(args).client)) as backend:
            yield backend
    else:
        from .backends import LocalBackend

        yield LocalBackend(open_llm(flags.settings_from(args).engine))


def open_screen(*, keep_history: bool, commands: tuple[str, ...]) -> Screen:
    """Return the terminal when there is one on both sides, else the plain pipe."""
    from .screen import PipeScreen, TerminalScreen

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return PipeScreen()
    from seamount.core.settings import data_folder

    return TerminalScreen(data_folder() / "chat_history" if keep_history else None, commands)


def open_state(server: ServerConfig, *, must_exist: bool = False) -> Database:
    """Open the state database, made and migrated where need be. The caller closes it.

    Args:
        must_exist: refuse where there is no file yet, and make none.

    Raises:
        SeamountError: it cannot be used.
    """
    from seamount.core.state import open_state

    return open_state(server.database, must_exist=must_exist)


def has_administrator(state: Database) -> bool:
    """Say whether there has ever been one: then every request needs a key."""
    from seamount.security.keys import ApiKeys

    return ApiKeys(state).has_administrator()


def make_app(settings: Settings, progress: LoadingProgress, state: Database) -> FastAPI:
    """Return the server's application over a worker process of its own; nothing runs yet.

    Args:
        state: from `open_state`; open for as long as the application runs.

    Raises:
        SeamountError: the folder, its tokenizer or its template cannot be used.
    """
    from seamount.engine.client import WorkerEngine
    from seamount.models.locate import locate_model
    from seamount.models.prompt import PromptEncoder
    from seamount.server.app import create_app

    encoder = PromptEncoder.from_folder(locate_model(settings.engine.model))
    engine = WorkerEngine(settings.engine, on_progress=progress)
    return create_app(engine, encoder, settings.server, make_access(state), state)


def make_access(state: Database) -> Access:
    """Return who may come in: holders of keys, once there has been an administrator; till then this machine's own."""
    from seamount.security.authenticators import KeyAuthenticator, OpenOnLoopback
    from seamount.security.keys import ApiKeys
    from seamount.security.usage import UsageLedger
    from seamount.server.door.access import Access

    keys = ApiKeys(state)
    if not keys.has_administrator():
        return Access(OpenOnLoopback())
    return Access(KeyAuthenticator(keys), UsageLedger(state))


def _engine_flags_given(args: argparse.Namespace) -> list[str]:
    from seamount.core.settings import EngineConfig

    return [name for name in EngineConfig.model_fields if getattr(args, name, None) is not None]
