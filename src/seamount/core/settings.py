"""Settings: how this process runs. Read once, in `cli.wire`; frozen afterwards.

Order, the later winning: defaults, a TOML file (the one `SEAMOUNT_CONFIG` names, else `seamount/seamount.toml` in the
XDG configuration folder, where it exists), `SEAMOUNT_ENGINE__X`, `SEAMOUNT_SERVER__X` and `SEAMOUNT_CLIENT__X` in the
environment, command-line flags. Unknown keys fail. This is the only module that reads the environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from .errors import ConfigError

DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
SpeculationName = Literal["auto", "off", "mtp"]
QuantizationName = Literal["auto", "none", "int8", "int4"]


class EngineConfig(BaseModel):
    """How the engine loads and schedules one model. `LLM(...)` takes the same names as keyword arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "seamount-tiny", description="Folder of a checkpoint, a .gguf file, or the name of an embedded model."
    )
    dtype: DTypeName = Field(
        "auto",
        description="Precision of weights and cache. auto: the checkpoint's own (FP8 becomes bfloat16).",
    )
    quantization: QuantizationName = Field(
        "auto",
        description="Precision of weight matrices. auto: the checkpoint's own; none: as dtype says; int8: 8 bits per "
        "weight; int4: 4 bits in groups. The last two round 16-bit checkpoints while loading.",
    )
    adapter: Path | None = Field(
        None, description="Folder of a LoRA adapter, as PEFT writes it, that is added to the weights while loading."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto: a GPU where there is one.")
    max_model_len: int | None = Field(
        None,
        ge=16,
        le=2**24,
        description="Tokens of prompt plus output. None: the model's, or what fits in memory.",
    )
    cache_memory_bytes: int | None = Field(
        None, ge=2**16, description="Bytes for the paged cache. None: chosen from the memory that is free."
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens per cache block. Small blocks waste less memory.")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Sequences that run side by side.")
    max_step_tokens: int = Field(
        2048,
        ge=16,
        le=2**20,
        description="Tokens per step, prefill and decode together: bounds the pause of a stream.",
    )
    enable_prefix_cache: bool = Field(True, description="Reuse the cache of equal prompt prefixes.")
    speculation: SpeculationName = Field(
        "off",
        description="Guess a token ahead with the checkpoint's multi-token-prediction block, where it has one. off: "
        "never, and the block is not loaded (on CPUs measured so far it does not pay); auto: at the loads where "
        "guessing is faster than only keeping the block's cache up to date; mtp: always. The output is the same.",
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads. None: the physical cores this process may use."
    )


class ServerConfig(BaseModel):
    """How the HTTP server listens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1", description="Address to bind. Beyond loopback only once `seamount init` has made an administrator."
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one and prints it.")
    grpc_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port of the gRPC service, at the same address; 0 takes and prints a free one. None: no gRPC.",
    )
    served_model_name: str | None = Field(None, description="Name that clients use. None: the folder's name.")
    drain_timeout_s: float = Field(30.0, ge=0, description="Seconds that running answers get after SIGTERM.")
    max_waiting: int = Field(
        512,
        ge=1,
        le=2**20,
        description="Requests that may wait for the engine; beyond it new ones are refused, or those of whoever has "
        "most of them waiting.",
    )
    max_wait_s: float = Field(
        60.0,
        ge=0.1,
        le=86_400,
        description="Seconds; a request that would wait longer, by the speed measured, is refused at once. Clients "
        "give up after 600 s at the latest, people much sooner.",
    )
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="Largest request body, and line of a batch's file.")
    max_file_bytes: int = Field(200 * 2**20, ge=1024, le=2**40, description="Largest file that is sent for a batch.")
    max_tenant_file_bytes: int = Field(
        2 * 2**30,
        ge=1024,
        le=2**50,
        description="Bytes that one tenant's files and batches' answers may take in the state database.",
    )
    response_retention_days: int = Field(
        30,
        ge=0,
        le=90,
        description="Days for which responses of /v1/responses are kept, with what they answered; 0 keeps none. What "
        "was to be kept for longer is cut to it when the server starts.",
    )
    max_tenant_response_bytes: int = Field(
        2**30,
        ge=1024,
        le=2**50,
        description="Bytes that one tenant's kept responses may take in the state database.",
    )
    database: str | None = Field(
        None,
        description="Where keys and usage are kept: path of an SQLite file, or postgresql://user:password@host/name. "
        "None: state.db in the data folder. A URL with a password belongs in the environment or the file.",
    )
    tls_cert: Path | None = Field(
        None,
        description="Certificate chain in PEM; with tls_key, the server speaks TLS 1.3. Read again when it changes.",
    )
    tls_key: Path | None = Field(None, description="Private key of tls_cert, in PEM, without a passphrase.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Form of log lines on stderr. text: for people; json: one object per line, for programs."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="From which level on the server logs. No level logs prompts, answers or keys."
    )
    otlp_endpoint: str | None = Field(
        None,
        max_length=2048,
        pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$",
        description="Collector of OpenTelemetry traces, such as http://127.0.0.1:4318 (OTLP over HTTP; needs the extra "
        "tracing). None: no traces are made or sent, whatever OTEL_ variables say.",
    )


class ClientConfig(BaseModel):
    """How commands that ask a server, such as `chat --url`, prove who they are. No flags: others may see those."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_key: str | None = Field(None, repr=False, description="API key to send to the server. None: no key is sent.")
    tls_ca: Path | None = Field(
        None, description="Authority to trust, in PEM, such as ca.pem of `seamount cert`. None: the system's."
    )


class Settings(BaseSettings):
    """All settings of a `seamount` process."""

    model_config = SettingsConfigDict(env_prefix="SEAMOUNT_", env_nested_delimiter="__", extra="forbid", frozen=True)

    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()
    client: ClientConfig = ClientConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the TOML file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=_config_file())


def load_settings(engine: dict[str, Any], server: dict[str, Any], *, command: str = "serve") -> Settings:
    """Read all settings.

    Args:
        engine, server: what the command line gave; a value of None means that the flag was not given.
        command: the subcommand whose help lists them.

    Raises:
        ConfigError: a key is unknown, a value is out of range, or the file cannot be read; the message names it.
    """
    _refuse_unknown_environment()
    flags: dict[str, Any] = {"engine": _given(engine), "server": _given(server)}
    try:
        return Settings(**{name: values for name, values in flags.items() if values})
    except ValidationError as cause:
        raise config_error(cause, hint=f"`seamount {command} --help` lists the settings.") from cause
    except (SettingsError, OSError, ValueError) as cause:
        raise ConfigError(f"Settings could not be read: {cause}.", hint=f"See {_config_file()}.") from cause


def config_error(cause: ValidationError, *, hint: str) -> ConfigError:
    """Turn pydantic's report into one typed error that names each key and its problem."""
    problems = "; ".join(
        f"{'.'.join(str(part) for part in e['loc']) or 'settings'}: {e['msg']}" for e in cause.errors(include_url=False)
    )
    return ConfigError(f"Settings are wrong: {problems}.", hint=hint)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _config_file() -> Path:
    named = os.environ.get("SEAMOUNT_CONFIG")
    if named:
        return Path(named)
    return config_folder() / "seamount.toml"


def config_folder() -> Path:
    """Return the XDG configuration folder of Seamount (not created)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "seamount"


def data_folder() -> Path:
    """Return the XDG data folder of Seamount (not created): the state database, chat history, saved conversations."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "seamount"


def cache_folder() -> Path:
    """Return the XDG cache folder of Seamount (not created): what can be made again, such as compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seamount"


def tell_libraries(variables: dict[str, str], *, unless_set: dict[str, str]) -> None:
    """Set what foreign libraries read from the environment alone, before they are imported.

    Args:
        unless_set: give way to what the user has set.
    """
    os.environ.update(variables)
    for name, value in unless_set.items():
        os.environ.setdefault(name, value)


def _refuse_unknown_environment() -> None:
    known = {"SEAMOUNT_CONFIG"}
    for name in os.environ:
        is_ours = name.startswith("SEAMOUNT_") and name not in known
        if is_ours and not name.startswith(("SEAMOUNT_ENGINE__", "SEAMOUNT_SERVER__", "SEAMOUNT_CLIENT__")):
            raise ConfigError(
                f"The environment variable {name} is not a setting.",
                hint="Settings are spelled SEAMOUNT_ENGINE__NAME, SEAMOUNT_SERVER__NAME or SEAMOUNT_CLIENT__NAME.",
            )


class Ranks(NamedTuple):
    """What torchrun tells each process that it starts.

    Attributes:
        rank, size: number of this process, from 0, and how many there are.
        local_rank: its number on this machine.
    """

    rank: int
    size: int
    local_rank: int


def ranks() -> Ranks:
    """Return this process's place among those that torchrun started; the only one without torchrun.

    Raises:
        ConfigError: the variables say something that torchrun never says.
    """
    given = {name: os.environ.get(name, default) for name, default in _TORCHRUN}
    try:
        found = Ranks(*map(int, given.values()))
    except ValueError:
        found = Ranks(-1, 0, -1)
    if not 0 <= found.rank < found.size or found.local_rank < 0:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(f"There is no such rank: {told}.", hint="Leave these variables to torchrun.")
    return found


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
