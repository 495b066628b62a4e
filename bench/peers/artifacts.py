"""What each peer reads, made once from one checkpoint: the checkpoint itself, an OpenVINO folder, a GGUF file.

Called by the driver. Things are made under a name of their own and renamed when complete, so that a run that is
interrupted leaves nothing that looks whole.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from environments import Environment
from traffic import Shape

_HERE = Path(__file__).resolve().parent
_OPENVINO = {
    "openvino-int8": ["--weight-format", "int8"],
    "openvino-int4": ["--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0"],
}


class ConversionError(Exception):
    """A converter failed; the message is the end of what it said."""


def checkpoint(shape: Shape, folder: Path) -> Path:
    """The folder with the shape's weights: random ones are written on first use.

    Raises:
        ConversionError: they could not be written.
    """
    if shape.folder is not None:
        return shape.folder
    target = folder / "checkpoints" / shape.name
    if not target.exists():
        command = [sys.executable, str(_HERE.parent / "make_checkpoint.py"), str(shape.recipe)]
        layers = [] if shape.layers is None else ["--layers", str(shape.layers)]
        _make(target, lambda partial: [*command, str(partial), *layers])
    return target


def artifact(kind: str, shape: Shape, source: Path, folder: Path, environment: Environment | None) -> Path:
    """The path of what a peer of this kind reads, converted on first use.

    Raises:
        ConversionError: the converter refused the network or failed.
    """
    if kind == "checkpoint" or environment is None:
        return source
    target = folder / "converted" / f"{shape.name}-{kind}"
    if target.exists():
        return target
    programs = environment.python.parent
    if kind in _OPENVINO:
        command = [str(programs / "optimum-cli"), "export", "openvino", "--task", "text-generation-with-past"]
        command += ["--model", str(source), *_OPENVINO[kind]]
        _make(target, lambda partial: [*command, str(partial)])
    elif kind == "w8a8":
        command = [str(environment.python), str(_HERE / "convert_w8a8.py"), str(source)]
        _make(target, lambda partial: [*command, str(partial)])
    else:
        command = [str(environment.python), str(_HERE / "convert_gguf.py"), str(source)]
        _make(target, lambda partial: [*command, str(partial), kind.removeprefix("gguf-")])
    return target


def num_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _make(target: Path, command) -> None:
    partial = target.with_name(f"partial-{target.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {target.name} ...", flush=True)
    done = subprocess.run(command(partial), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or not partial.exists():
        said = [line for line in done.stdout.splitlines() if line.strip()]
        raise ConversionError(said[-1][:1500] if said else f"ended with status {done.returncode}")
    partial.rename(target)
