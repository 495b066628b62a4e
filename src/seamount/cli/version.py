"""`seamount version`: what is installed here. Imports nothing heavy: versions are read from package metadata."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version

from seamount.version import __version__

DESCRIPTION = "Print the version of Seamount; with --json also of what it stands on, for a bug report."
ARGUMENTS = "[--json]"
EXAMPLES = """  seamount version
  seamount version --json"""

_FOUNDATIONS = ("torch", "numpy", "safetensors", "tokenizers", "fastapi", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the version."""
    if not args.json:
        print(f"seamount {__version__}")
        return 0
    facts = {
        "seamount": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in _FOUNDATIONS},
    }
    print(json.dumps(facts, indent=2))
    return 0


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
