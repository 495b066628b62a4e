"""Finds the folder, or the .gguf file, that a model name means.

Called by the CLI, the engine and `LLM`. Looks at names and file listings only: it reads no file, and never
the network.
"""

from __future__ import annotations

import re
from pathlib import Path

from seamount.core.errors import CheckpointError, NotFoundError

_EMBEDDED = Path(__file__).parent / "embedded"
_GGUF_SUFFIX = ".gguf"
_GGUF_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_gguf(path: Path) -> bool:
    """Whether a model's path is a .gguf file, and not a folder."""
    return path.suffix == _GGUF_SUFFIX and path.is_file()


def model_name(path: Path) -> str:
    """The name that a checkpoint folder or a .gguf file gives its model: of a file without its number as a shard."""
    if not is_gguf(path):
        return path.resolve().name
    match = _GGUF_SHARD.fullmatch(path.name)
    return match[1] if match else path.stem


def embedded_models() -> tuple[str, ...]:
    """Return the names of the models that ship in the package, sorted."""
    if not _EMBEDDED.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in _EMBEDDED.iterdir() if (entry / "config.json").is_file()))


def locate_model(name_or_folder: str) -> Path:
    """Return the checkpoint folder or .gguf file that a name or a path means. A known name wins over a folder of
    the same name; a folder without safetensors means the one model in .gguf that it holds, by its first file.

    Raises:
        NotFoundError: nothing has this name.
        CheckpointError: the path is another file, or a folder that holds no checkpoint, or several in .gguf.
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
        if is_gguf(path):
            return path
        if path.exists():
            raise CheckpointError(
                f"{path} is a file, not a checkpoint folder.", hint=f"Give its folder: {path.parent}."
            )
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
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        raise CheckpointError(f"The folder {folder} is empty.", hint="Give the folder that holds config.json.")
    if not any(name.endswith(".safetensors") for name in names):
        models = {model_name(folder / name): name for name in reversed(names) if is_gguf(folder / name)}
        if len(models) == 1:
            return folder / next(iter(models.values()))
        if models:
            found = ", ".join(sorted(models.values())[:5])
            raise CheckpointError(
                f"{folder} holds {len(models)} models in GGUF: {found}.", hint="Give one of the files."
            )
    if (folder / "config.json").is_file():
        return folder
    nested = [name for name in names if (folder / name / "config.json").is_file()]
    hint = f"Did you mean {folder / nested[0]}?" if nested else "Give the folder that holds config.json and weights."
    if "adapter_config.json" in names:
        hint = f"It is an adapter: give its model's folder, and --adapter {folder}."
    raise CheckpointError(f"The folder {folder} has no config.json, so it is no checkpoint.", hint=hint)


def _known() -> str:
    names = embedded_models()
    return f"Give a folder, or an embedded model: {', '.join(names)}." if names else "Give a checkpoint folder."
