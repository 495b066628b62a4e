"""`seamount cert`: TLS certificates from a private authority in a folder."""

from __future__ import annotations

import argparse
import json
import socket
from datetime import UTC, datetime
from pathlib import Path

DESCRIPTION = """Make a certificate and key for the server, signed by a private authority that is kept in the same
folder and made at first use. For those who have no authority of their own: clients must be given ca.pem. Run again, it
makes a new certificate under the same authority, and a running server takes it without a restart."""
ARGUMENTS = "FOLDER [FLAGS]"
EXAMPLES = """  seamount cert tls
  seamount cert tls --name models.example --name 10.0.0.5 --days 90"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("folder", metavar="FOLDER", help="where the files are, or will be")
    parser.add_argument(
        "--name",
        dest="names",
        action="append",
        metavar="NAME",
        help="host name or IP address that clients use; may be repeated (this machine's name, localhost and 127.0.0.1)",
    )
    parser.add_argument("--days", type=_days, default=397, metavar="N", help="days that it is valid (397)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Make the files and say what each is for."""
    from seamount.security.certificates import make_certificates

    names = args.names or [socket.gethostname(), "localhost", "127.0.0.1", "::1"]
    files = make_certificates(Path(args.folder), names, days=args.days, now=datetime.now(UTC))
    if args.json:
        shown = {"ca": files.ca, "ca_key": files.ca_key, "cert": files.cert, "key": files.key}
        print(json.dumps({**{name: str(path) for name, path in shown.items()}, "made_authority": files.made_authority}))
        return 0
    print(f"""{files.ca}  the authority{"" if files.made_authority else " (as it was)"}: give this to clients
{files.ca_key}  its key: keep it offline, whoever has it can pose as your server
{files.cert}  the server's certificate, for {", ".join(names)}
{files.key}  its key

  seamount serve --tls-cert {files.cert} --tls-key {files.key}
  curl --cacert {files.ca} https://{names[0]}:8000/healthz""")
    return 0


def _days(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text[:6]) <= 3650:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days from 1 to 3650")
    return int(text)
