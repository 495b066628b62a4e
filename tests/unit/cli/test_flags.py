"""Every setting and every sampling parameter has a flag; flags win over the environment, which wins over the file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import BaseModel

from seamount.cli import flags
from seamount.cli.main import command_parser, main
from seamount.core.errors import ConfigError, InvalidRequestError
from seamount.core.sampling import SamplingParams
from seamount.core.settings import EngineConfig, ServerConfig


def _flags_of(command: str) -> set[str]:
    text = command_parser(command).format_help()
    return {word.strip("[],") for word in text.split() if word.strip("[],").startswith("--")}


@pytest.mark.parametrize(
    ("command", "config"),
    [("serve", EngineConfig), ("serve", ServerConfig), ("chat", EngineConfig), ("generate", EngineConfig)],
)
def test_every_setting_has_a_flag(command: str, config: type[BaseModel]) -> None:
    wanted = {"--" + name.replace("_", "-") for name in config.model_fields if name != "model"}
    assert wanted <= _flags_of(command)


def test_every_sampling_parameter_has_a_flag() -> None:
    names = {f.name for f in fields(SamplingParams)} - {"grammar"}  # a text of its own kind, which the API takes
    assert {"--" + name.replace("_", "-") for name in names} <= _flags_of("generate")


def test_flags_become_sampling_parameters() -> None:
    words = "--prompt x --stop a --stop b --stop-token-ids 7 --logit-bias 5=-1.5 --seed 3 --ignore-eos --top-p 0.5"
    given = flags.sampling_given(command_parser("generate").parse_args(words.split()))
    assert given == {
        "stop": ("a", "b"),
        "stop_token_ids": (7,),
        "logit_bias": {5: -1.5},
        "seed": 3,
        "ignore_eos": True,
        "top_p": 0.5,
    }
    SamplingParams(**given)


def test_no_flag_means_no_parameter() -> None:
    assert flags.sampling_given(command_parser("generate").parse_args(["--prompt", "x"])) == {}


def test_a_broken_logit_bias_is_refused() -> None:
    args = command_parser("generate").parse_args(["--prompt", "x", "--logit-bias", "5:1"])
    with pytest.raises(InvalidRequestError, match="TOKEN_ID=BIAS"):
        flags.sampling_given(args)


def test_a_sampling_value_out_of_range_is_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "/no/such/folder", "--prompt", "x", "--top-p", "7"]) == 2
    assert "top_p is 7.0" in capsys.readouterr().err


def test_flags_win_over_environment_over_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "seamount.toml"
    file.write_text("[server]\nport = 1001\nhost = '127.0.0.2'\n[engine]\nblock_size = 8\n", encoding="utf-8")
    monkeypatch.setenv("SEAMOUNT_CONFIG", str(file))
    monkeypatch.setenv("SEAMOUNT_SERVER__PORT", "1002")
    monkeypatch.setenv("SEAMOUNT_ENGINE__BLOCK_SIZE", "32")
    args = command_parser("serve").parse_args(["folder", "--port", "1003", "--no-enable-prefix-cache"])
    settings = flags.settings_from(args)
    assert (settings.server.port, settings.server.host) == (1003, "127.0.0.2")
    assert settings.engine.block_size == 32
    assert settings.engine.model == "folder"
    assert settings.engine.enable_prefix_cache is False


def test_a_setting_out_of_range_names_itself() -> None:
    args = command_parser("serve").parse_args(["--port", "70000"])
    with pytest.raises(ConfigError, match=r"server\.port"):
        flags.settings_from(args)


def test_a_typed_value_of_the_wrong_kind_is_refused() -> None:
    assert flags.sampling_value("seed", "12") == 12
    with pytest.raises(InvalidRequestError, match="temperature"):
        flags.sampling_value("temperature", "warm")
