"""Finds the folder that a model name means.

Called by the CLI, the engine and `LLM`. Looks at names and file listings only: it reads no file, and never
the network.
"""

from __future__ import annotations

import re
from pathlib import Path

from seamount.core.errors import CheckpointError, NotFoundError, UnsupportedModelError

_EMBEDDED = Path(__file__).parent / "embedded"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def embedded_models() -> tuple[str, ...]:
    """Return the names of the models that ship in the package, sorted."""
    if not _EMBEDDED.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in _EMBEDDED.iterdir() if (entry / "config.json").is_file()))


def locate_model(name_or_folder: str) -> Path:
    """Return the checkpoint folder that a name or a path means. A known name wins over a folder of the same
    name.

    Raises:
        NotFoundError: nothing has this name.
        UnsupportedModelError: the path is a file of a format that is not read.
        CheckpointError: the path is a file, or a folder that holds no checkpoint.
    """
    name = name_or_folder.strip()
    if not name or "\0" in name:
        raise NotFoundError("The model name is empty or not a path.", hint=_known(), param="model")
    if name in embedded_models():
        return _EMBEDDED / name
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _checked(path)
        if path.exists():
            raise _not_a_folder(path)
    except OSError as cause:  # a name too long for the file system, or a folder that may not be entered
        raise NotFoundError(
            f"{name[:200]} cannot be opened: {cause.strerror}.", hint=_known(), param="model"
        ) from cause
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        hint = f"Seamount does not download models: fetch {name} yourself and give its folder. {_known()}"
        raise NotFoundError(
            f"There is no folder {name}; it looks like the id of a model hub.", hint=hint, param="model"
        )
    raise NotFoundError(f"There is no model or folder named {name[:200]}.", hint=_known(), param="model")


def _checked(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        raise CheckpointError(f"The folder {folder} is empty.", hint="Give the folder that holds config.json.")
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        raise _gguf(folder / gguf[0])
    nested = [name for name in names if (folder / name / "config.json").is_file()]
    hint = f"Did you mean {folder / nested[0]}?" if nested else "Give the folder that holds config.json and weights."
    raise CheckpointError(f"The folder {folder} has no config.json, so it is no checkpoint.", hint=hint)


def _not_a_folder(path: Path) -> CheckpointError:
    if path.suffix == ".gguf":
        return _gguf(path)
    return CheckpointError(f"{path} is a file, not a checkpoint folder.", hint=f"Give its folder: {path.parent}.")


def _gguf(path: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} is GGUF, which this version does not read.",
        hint="Give a folder in the Hugging Face layout: config.json, tokenizer.json and *.safetensors.",
    )


def _known() -> str:
    names = embedded_models()
    return f"Give a folder, or an embedded model: {', '.join(names)}." if names else "Give a checkpoint folder."
