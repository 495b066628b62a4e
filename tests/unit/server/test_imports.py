"""The server's process encodes and streams; it must not pay for torch."""

import subprocess
import sys

PROGRAM = """
import sys
import seamount.server.app, seamount.server.serve, seamount.engine.client, seamount.models.prompt
heavy = {"torch", "transformers", "safetensors.torch"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


def test_the_server_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
