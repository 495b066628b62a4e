"""Flags made from the settings and from the sampling parameters, so that neither is written twice.

Called by the commands' `add_arguments`; `core.settings` (pydantic) is imported only when a command has such flags.
"""

from __future__ import annotations

import argparse
import types
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import SamplingParams

if TYPE_CHECKING:
    from pydantic import BaseModel

    from seamount.core.settings import Settings

_SAMPLING_HELP = {
    "max_tokens": "most tokens to generate; default: up to the model's context",
    "min_tokens": "no end before this many tokens",
    "temperature": "0 always takes the most probable token",
    "top_p": "keep the smallest set of tokens whose probability reaches this",
    "top_k": "keep this many most probable tokens; 0 keeps all",
    "min_p": "drop tokens below this share of the most probable one's probability",
    "seed": "makes sampling repeatable",
    "n": "independent continuations of one prompt",
    "stop": "text that ends the output; may be given several times",
    "stop_token_ids": "token id that ends the output; may be given several times",
    "ignore_eos": "go on past the end-of-sequence token",
    "presence_penalty": "against tokens that were generated already, in [-2, 2]",
    "frequency_penalty": "the same, growing with each time, in [-2, 2]",
    "repetition_penalty": "against tokens of the prompt and the output; 1 is off",
    "logit_bias": "added to one token's logit, as TOKEN_ID=BIAS; may be given several times",
    "logprobs": "report this many most probable tokens beside each chosen one (with --json)",
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional MODEL, which is the setting `engine.model`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a checkpoint, a .gguf file, or the name of an embedded model (default: seamount-tiny)",
    )


def add_engine_flags(parser: argparse.ArgumentParser, names: tuple[str, ...] | None = None) -> None:
    """Add a flag for these engine settings; by default for all but the model, which is no flag."""
    from seamount.core.settings import EngineConfig

    group = parser.add_argument_group("engine settings", "SEAMOUNT_ENGINE__NAME in the environment sets the same.")
    _add_settings(group, EngineConfig, names or tuple(name for name in EngineConfig.model_fields if name != "model"))


def add_server_flags(parser: argparse.ArgumentParser, names: tuple[str, ...] | None = None) -> None:
    """Add a flag for these server settings; by default for all."""
    from seamount.core.settings import ServerConfig

    group = parser.add_argument_group("server settings", "SEAMOUNT_SERVER__NAME in the environment sets the same.")
    _add_settings(group, ServerConfig, names or tuple(ServerConfig.model_fields))


def add_sampling_flags(parser: argparse.ArgumentParser, names: tuple[str, ...] = tuple(_SAMPLING_HELP)) -> None:
    """Add a flag for each of these sampling parameters, all by default."""
    group = parser.add_argument_group("sampling", "What is not given is as the checkpoint recommends.")
    hints = get_type_hints(SamplingParams)
    for name in names:
        options: dict[str, Any] = {"dest": name, "help": _SAMPLING_HELP[name]}
        kind = _bare(hints[name])
        if kind is bool:
            options["action"] = "store_true"
            options["default"] = None
        elif name == "logit_bias":
            options.update(action="append", metavar="TOKEN_ID=BIAS", type=str)
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            options.update(action="append", metavar=_metavar(item), type=item)
        else:
            options.update(type=kind, metavar=_metavar(kind))
        group.add_argument(_flag(name), **options)


def settings_from(args: argparse.Namespace) -> Settings:
    """Read all settings, with the flags that were given as the last word.

    Raises:
        ConfigError: a setting is wrong or unknown.
    """
    from seamount.core.settings import EngineConfig, ServerConfig, load_settings

    given = vars(args)
    return load_settings(
        {name: given.get(name) for name in EngineConfig.model_fields},
        {name: given.get(name) for name in ServerConfig.model_fields},
        command=given.get("command", "serve"),
    )


def sampling_given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling parameters that were given as flags.

    Raises:
        InvalidRequestError: a logit bias is not of the form TOKEN_ID=BIAS.
    """
    found = {f.name: getattr(args, f.name, None) for f in fields(SamplingParams)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(_bias(text) for text in given["logit_bias"])
    return given


def sampling_value(name: str, text: str) -> Any:
    """Return the value that a person typed for a sampling parameter of one number.

    Raises:
        InvalidRequestError: it is no number of the parameter's kind.
    """
    kind = _bare(get_type_hints(SamplingParams)[name])
    try:
        return kind(text)
    except ValueError as cause:
        raise InvalidRequestError(f"{name} cannot be {text!r}.", param=name) from cause


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError as cause:
        message = f"--logit-bias {text} is not of the form TOKEN_ID=BIAS."
        raise InvalidRequestError(message, param="logit_bias") from cause


def _add_settings(group: argparse._ArgumentGroup, config: type[BaseModel], names: tuple[str, ...]) -> None:
    for name in names:
        setting = config.model_fields[name]
        shown = "" if setting.default is None else f" Default: {setting.default}."
        options: dict[str, Any] = {"dest": name, "help": f"{setting.description}{shown}".replace("%", "%%")}
        kind = _bare(setting.annotation)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
            options["default"] = None
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options.update(type=kind, metavar=_metavar(kind))
        group.add_argument(_flag(name), **options)


def _bare(annotation: Any) -> Any:
    """Return the type of an optional one."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(arm for arm in get_args(annotation) if arm is not type(None))
    return annotation


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")
