"""`seamount serve`: the chat page and the OpenAI API over one model, until Ctrl-C."""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import shlex
import sys

from . import flags, wire
from .progress import LoadingProgress

DESCRIPTION = """Start the server: a chat page for the browser, and OpenAI's API for programs. Ctrl-C lets running
answers end; a second one does not."""
ARGUMENTS = "[MODEL] [FLAGS]"
EXAMPLES = """  seamount serve
  seamount serve --port 18080 /models/folder
  seamount serve /models/folder --dtype bfloat16 --max-model-len 8192"""

_QUESTION = "What can you do?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    flags.add_model(parser)
    flags.add_server_flags(parser)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    settings = flags.settings_from(args)
    from seamount.server.listener import bind

    _log_to_stderr()
    if not is_loopback(settings.server.host):
        print(
            f"warning: bound to {settings.server.host}, and there is no sign-in: whoever reaches this port can use the "
            "model. Bind to 127.0.0.1, or put a gateway in front that asks who it is.",
            file=sys.stderr,
        )
    # Bound before anything is loaded, so that a taken port is told at once.
    with bind(settings.server) as listener, LoadingProgress(settings.engine.model) as progress:
        from seamount.server.serve import run_server

        app = wire.make_app(settings, progress)

        def ready(base_url: str) -> None:
            progress.close()
            print(greeting(base_url, app.state.service.model_name()), flush=True)

        run_server(app, settings.server, ready, listener)
    return 0


def greeting(base_url: str, model: str) -> str:
    """Return what is said when requests are taken: where to chat, the API's base, and a call that works when pasted."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": _QUESTION}]}, ensure_ascii=False)
    call = f"curl {base_url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    return f"""
  {model} is ready.

  Chat in a browser    {base_url}/
  API base             {base_url}/v1
  One call             {call}

  Ctrl-C stops the server."""


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for chatty in ("uvicorn", "httpx", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
