"""`seamount serve`: the chat page and the OpenAI API over one model, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from seamount.core.identity import is_loopback

from . import flags, wire
from .progress import LoadingProgress

if TYPE_CHECKING:
    from seamount.core.settings import ServerConfig

DESCRIPTION = """Start the server: a chat page for the browser, and OpenAI's API for programs. Ctrl-C lets running
answers end; a second one does not. Until `seamount init` has made an administrator, only this machine is answered and
no key is asked for; from then on every request needs one."""
ARGUMENTS = "[MODEL] [FLAGS]"
EXAMPLES = """  seamount serve
  seamount serve --port 18080 /models/folder
  seamount serve /models/folder --dtype bfloat16 --max-model-len 8192"""

_QUESTION = "What can you do?"
_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    flags.add_model(parser)
    flags.add_server_flags(parser)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    settings = flags.settings_from(args)
    server = settings.server
    from seamount.server.door import listener, tls
    from seamount.server.telemetry.logs import set_up_logging

    set_up_logging(server.log_format, server.log_level, sys.stderr)
    tls.server_context(server)  # wrong files are told before anything is loaded
    with closing(wire.open_state(server)) as state:
        has_administrator = wire.has_administrator(state)
        listener.check_exposure(server, has_administrator=has_administrator)
        for line in notices(server, has_administrator=has_administrator):
            if server.log_format == "json":
                _log.warning("%s", line)
            else:
                print(line, file=sys.stderr)
        # Bound before anything is loaded, so that a taken port is told at once.
        with listener.bind(server) as bound, LoadingProgress(settings.engine.model) as progress:
            from seamount.server.serve import run_server

            app = wire.make_app(settings, progress, state)

            def ready(base_url: str) -> None:
                progress.close()
                model = app.state.service.model_name()
                rpc = app.state.grpc_address
                told = greeting(
                    base_url, model, asks_for_key=has_administrator, grpc_address=rpc, tls_cert=server.tls_cert
                )
                print(told, flush=True)

            run_server(app, server, ready, bound)
    return 0


def notices(server: ServerConfig, *, has_administrator: bool) -> list[str]:
    """Return what its operator must know of who can reach the server."""
    if not has_administrator:
        return [
            "note: there is no administrator yet, so only this machine is answered and no key is asked for. "
            "`seamount init` changes that."
        ]
    if server.tls_cert is None and not is_loopback(server.host):
        return [
            f"warning: bound to {server.host} without TLS: keys and conversations travel readable. Set --tls-cert and "
            "--tls-key (`seamount cert` makes a pair), or put a gateway in front that speaks TLS."
        ]
    return []


def greeting(
    base_url: str,
    model: str,
    *,
    asks_for_key: bool = False,
    grpc_address: str | None = None,
    tls_cert: Path | None = None,
) -> str:
    """Return what is said when requests are taken: where to chat, the API's base, and a call that works when pasted.

    Args:
        tls_cert: the certificate, if TLS is spoken: the address is then one that it is for, and the authority that lies
            beside it, as `seamount cert` makes it, is given to curl.
    """
    trust = ""
    if tls_cert is not None:
        base_url = _certified(base_url, tls_cert)
        authority = tls_cert.with_name("ca.pem")
        trust = f"--cacert {shlex.quote(str(authority))} " if authority.is_file() else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": _QUESTION}]}, ensure_ascii=False)
    headers = "-H 'Content-Type: application/json'"
    if asks_for_key:
        headers += ' -H "Authorization: Bearer $KEY"'
    rpc = f"\n  gRPC                 {grpc_address}" if grpc_address else ""
    call = f"curl {trust}{base_url}/v1/chat/completions {headers} -d {shlex.quote(body)}"
    return f"""
  {model} is ready.

  Chat in a browser    {base_url}/
  API base             {base_url}/v1{rpc}
  One call             {call}

  Ctrl-C stops the server."""


def _certified(base_url: str, cert: Path) -> str:
    """Return the address under a name that the certificate is for: as it is, if it is for that."""
    from seamount.security.certificates import names_in

    names = [name for name in names_in(cert) if "*" not in name]
    parts = urlsplit(base_url)
    if not names or parts.hostname in names:
        return base_url
    host = f"[{names[0]}]" if ":" in names[0] else names[0]
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port is not None else "")
