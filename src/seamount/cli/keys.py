"""`seamount keys`: adds, lists and revokes API keys, straight in the state database."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from . import flags, wire

if TYPE_CHECKING:
    from seamount.core.database import Database
    from seamount.security.keys import ApiKey
    from seamount.security.usage import Tokens

DESCRIPTION = """Add, list and revoke API keys. They are kept in the state database, so this works while the server runs
and where it does not: whoever may write the database may make keys. A revoked key opens nothing from the next request
on."""
ARGUMENTS = "add | list | revoke [FLAGS]"
EXAMPLES = """  seamount keys add --tenant radiology --label "report assistant" --expires-in 90d
  seamount keys add --tenant lab --model seamount-tiny --route /v1/chat/completions --tokens-per-minute 20000
  seamount keys add --tenant monitoring --route /metrics
  seamount keys list
  seamount keys revoke aB3dE5fG7h"""

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
# A table in a pipe is for a file or for grep: nothing folds it.
_PIPE_WIDTH = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their flags."""
    # Without prog, argparse puts the arguments of our own usage line before each action's name.
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", prog=parser.prog)
    add = actions.add_parser("add", help="make a key and print it, once", allow_abbrev=False)
    add.add_argument(
        "--tenant", default="default", metavar="NAME", help="on whose behalf it acts; made if new (default)"
    )
    add.add_argument("--label", default="", metavar="TEXT", help="what to write beside it")
    add.add_argument("--admin", action="store_true", help="may use everything")
    add.add_argument("--model", dest="models", action="append", metavar="NAME", help="only this model; may be repeated")
    add.add_argument("--route", dest="routes", action="append", metavar="PATH", help="only this route; may be repeated")
    add.add_argument("--expires-in", type=_seconds, metavar="TIME", help="such as 30m, 12h, 90d or 4w (never)")
    add.add_argument("--requests-per-minute", type=int, metavar="N", help="most requests to the model (no limit)")
    add.add_argument("--tokens-per-minute", type=int, metavar="N", help="most tokens, in and out together (no limit)")
    add.add_argument("--max-concurrent", type=int, metavar="N", help="most requests at once (no limit)")
    add.add_argument(
        "--priority", type=int, default=0, metavar="N", help="-1 fills idle time, 0 is usual, 1 goes first"
    )
    listing = actions.add_parser("list", help="show every key, and the tokens that it used", allow_abbrev=False)
    revoke = actions.add_parser("revoke", help="make a key worthless at once", allow_abbrev=False)
    revoke.add_argument("id", metavar="ID", help="id of the key, as the list shows it; or the whole key")
    for action in (add, listing, revoke):
        action.add_argument("--json", action="store_true", help="print JSON")
        flags.add_server_flags(action, ("database",))


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    settings = flags.settings_from(args)
    with closing(wire.open_state(settings.server, must_exist=True)) as state:
        return {"add": _add, "list": _list, "revoke": _revoke}[args.action](args, state)


def _add(args: argparse.Namespace, state: Database) -> int:
    from seamount.core.identity import Limits, Principal
    from seamount.security.keys import ApiKeys

    principal = Principal(
        key_id=None,
        tenant=args.tenant,
        is_admin=args.admin,
        models=args.models and tuple(args.models),
        routes=args.routes and tuple(args.routes),
        limits=Limits(
            requests_per_minute=args.requests_per_minute,
            tokens_per_minute=args.tokens_per_minute,
            max_concurrent=args.max_concurrent,
        ),
        priority=args.priority,
    )
    from seamount.server.door.access import check_named

    check_named(args.routes or ())
    credential, key = ApiKeys(state).add(principal, label=args.label, lifetime_s=args.expires_in)
    if args.json:
        print(json.dumps({**_fields(key, {}), "key": credential}, ensure_ascii=False))
        return 0
    print(credential)
    sys.stdout.flush()
    until = f"until {_time(key.expires_s)}" if key.expires_s is not None else "until it is revoked"
    print(
        f"This is the key {key.id} of {key.principal.tenant}, good for {_scope(key)} {until}. It is shown this once; "
        "only its hash is kept.",
        file=sys.stderr,
    )
    return 0


def _list(args: argparse.Namespace, state: Database) -> int:
    from seamount.security.keys import ApiKeys
    from seamount.security.usage import usage_by_day

    keys, usage = ApiKeys(state).all(), usage_by_day(state)
    if args.json:
        print(json.dumps([_fields(key, usage.get(key.id, {})) for key in keys], ensure_ascii=False))
        return 0
    if not keys:
        print("There are no keys yet: `seamount init` makes the first one.")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("id", "tenant", "label", "good for", "expires", "state"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("id", "state"))
    for heading in ("tokens in", "tokens out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key in keys:
        total = _total(usage.get(key.id, {}))
        table.add_row(
            key.id,
            key.principal.tenant,
            key.label,
            _scope(key),
            _time(key.expires_s) or "never",
            key.state(time.time()),
            f"{total.num_prompt:,}",
            f"{total.num_generated:,}",
        )
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)
    return 0


def _revoke(args: argparse.Namespace, state: Database) -> int:
    from seamount.security.keys import ApiKeys, id_of

    keys = ApiKeys(state)
    key = keys.revoke(id_of(args.id) or args.id)
    if args.json:
        print(json.dumps(_fields(key, {}), ensure_ascii=False))
    else:
        print(f"The key {key.id} of {key.principal.tenant} opens nothing since {_time(key.revoked_s)}.")
    if key.principal.is_admin and not any(
        other.principal.is_admin and other.state(time.time()) == "active" for other in keys.all()
    ):
        print(
            "It was the last administrator's: nobody manages keys over HTTP any more. "
            "`seamount keys add --admin` makes another one here.",
            file=sys.stderr,
        )
    return 0


def _fields(key: ApiKey, usage: dict[str, Tokens]) -> dict[str, Any]:
    who = key.principal
    return {
        "id": key.id,
        "tenant": who.tenant,
        "label": key.label,
        "state": key.state(time.time()),
        "is_admin": who.is_admin,
        "models": who.models,
        "routes": who.routes,
        "requests_per_minute": who.limits.requests_per_minute,
        "tokens_per_minute": who.limits.tokens_per_minute,
        "max_concurrent": who.limits.max_concurrent,
        "priority": who.priority,
        "created": _time(key.created_s),
        "expires": _time(key.expires_s),
        "revoked": _time(key.revoked_s),
        "usage": {
            day: {"prompt_tokens": tokens.num_prompt, "generated_tokens": tokens.num_generated}
            for day, tokens in usage.items()
        },
    }


def _scope(key: ApiKey) -> str:
    who = key.principal
    if who.is_admin:
        return "everything"
    return ", ".join([*(who.models or ["all models"]), *(who.routes or ["all routes"])])


def _total(usage: dict[str, Tokens]) -> Tokens:
    from seamount.security.usage import Tokens

    return sum(usage.values(), Tokens())


def _time(unix_s: int | None) -> str | None:
    return None if unix_s is None else datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _seconds(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 30m, 12h or 90d; units are s, m, h, d and w")
    return int(match[1]) * _UNITS_S[match[2]]
