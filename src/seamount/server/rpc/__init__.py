"""Seamount over gRPC, beside the HTTP API: `server` runs it, `seamount.proto` says what it speaks.

Imported by `serve` where a port is set for it. Each method puts its message into the HTTP API's own words
(`translate`), has the same code answer it, and puts the answer into a message again (`answers`).
"""

from __future__ import annotations

import os

# gRPC's library speaks TLS 1.2 and 1.3 and has no setting for it, but one for the suites of 1.2, read from the
# environment when it is first used. This one suite needs a secret that both sides know beforehand. There is none, so
# every handshake of 1.2 fails, and TLS 1.3, whose suites are not on that list, is all that is left.
os.putenv("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-CHACHA20-POLY1305")
# The server begins other programs (the engine's worker, the sandbox of templates) and never goes on with gRPC in a copy
# of itself: nothing has to be prepared for that, nor complained about.
os.putenv("GRPC_ENABLE_FORK_SUPPORT", "0")
