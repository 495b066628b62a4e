"""`seamount init`: makes the first administrator's key, which closes the door to all who have none."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing

from . import flags, wire

DESCRIPTION = """Make the first administrator's key and print it, once: only its hash is kept. From then on every
server that uses this state database asks for keys, and may be bound beyond this machine. A server that runs already
asks from its next start on."""
ARGUMENTS = "[FLAGS]"
EXAMPLES = """  seamount init
  seamount init --database /srv/seamount/state.db
  seamount init --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--tenant", default="admin", metavar="NAME", help="tenant of the administrator (admin)")
    parser.add_argument("--label", default="first administrator", metavar="TEXT", help="what to write beside the key")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags.add_server_flags(parser, ("database",))


def run(args: argparse.Namespace) -> int:
    """Make the key and print it."""
    settings = flags.settings_from(args)
    from seamount.security.keys import ApiKeys

    with closing(wire.open_state(settings.server)) as state:
        credential, key = ApiKeys(state).add_first_administrator(tenant=args.tenant, label=args.label)
        where = state.name
    if args.json:
        print(json.dumps({"id": key.id, "key": credential, "database": where}))
        return 0
    print(credential)
    sys.stdout.flush()
    print(
        f"This is the administrator's key {key.id}. It is shown this once, so put it where secrets are kept; only its "
        f"hash is in {where}.\n`seamount keys add` makes keys for others. Servers that run already ask for keys once "
        "they are started again.",
        file=sys.stderr,
    )
    return 0
