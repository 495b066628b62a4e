"""Writes the OpenAPI document, which is checked in as `docs/openapi.json` and compared by a test.

Run `python -m seamount.server.openapi docs/openapi.json` after a change of the API.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine
from seamount.engine.fake_encoder import ByteEncoder

from .app import create_app


def openapi_text() -> str:
    """Return the document as it is checked in: the version is left to the running server."""
    document = create_app(FakeEngine(), ByteEncoder(), ServerConfig()).openapi()
    document["info"]["version"] = "current"
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(openapi_text(), encoding="utf-8")
