"""Configuration of a process: a frozen object whose fields are at once flags and environment variables.

Field `lease_ttl_ms` is flag `--lease-ttl-ms` and variable `FOREBAY_LEASE_TTL_MS`; a flag wins over a variable. It is
read once, at start, and a wrong value ends the process with a message. `--help` is made of the fields' descriptions.
"""

import sys
from argparse import Action, RawDescriptionHelpFormatter
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, NoDecode, SettingsConfigDict, SettingsError

from shared.local_sockets import checked_directory

_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def checked_redis_url(url: str) -> str:
    """The URL of a blackboard as given. Raises ValueError."""
    if not url.startswith(_REDIS_SCHEMES):
        raise ValueError("must be like redis://HOST:PORT/0 (or rediss://, unix://)")
    return url


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """A variable has the entries of a list with commas between; the flag, which may be repeated, comes as a list."""
    entries = [value] if isinstance(value, str) else value
    return [part.strip() for entry in entries for part in entry.split(",") if part.strip()]


StringList = Annotated[list[str], NoDecode, BeforeValidator(_parts)]
"""Entries that hold no comma."""


class _Help(RawDescriptionHelpFormatter):
    def _get_help_string(self, action: Action) -> str | None:
        """Says nothing of a default that is nothing."""
        return action.help.replace("(default: )", "").replace("(default: [])", "") if action.help else None


class ServiceConfig(BaseSettings):
    """What every service has."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="FOREBAY_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
    )

    host: str = Field("127.0.0.1", description="Interface to listen on, and the host that others are told to use.")
    port: int = Field(0, ge=0, le=65535, description="Port of the gRPC server; 0 takes a free one.")
    local_sockets: Annotated[str, AfterValidator(checked_directory)] = Field(
        "",
        description="Directory, this user's alone (mode 0700), in which this process finds the Unix sockets of others "
        "of its host that are given it, and listens at one if others of ours call it; empty: TCP alone.",
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 takes a free one.")
    redis_url: Annotated[str, AfterValidator(checked_redis_url)] = Field(
        "redis://127.0.0.1:6379/0", description="Redis, or any server with its protocol."
    )
    name: str = Field("", description="Stable name of this process; empty makes one from role and host.")
    heartbeat_ms: int = Field(500, ge=50, description="Time between two registrations on the blackboard.")
    registration_ttl_ms: int = Field(
        2_000, ge=200, description="A process that has not registered for this long is considered gone."
    )
    drain_grace_ms: int = Field(
        30_000, ge=0, description="Time that running requests have to finish after SIGTERM, before they are ended."
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        "INFO", description="Least severe level that is logged."
    )
    traces: Literal["none", "console", "otlp"] = Field(
        "none",
        description="Where spans go; otlp reads OpenTelemetry's own variables, OTEL_EXPORTER_OTLP_ENDPOINT first.",
    )

    @classmethod
    def load(cls, argv: list[str] | None = None) -> Self:
        """The configuration from flags and environment; ends the process with a message if it is wrong."""
        source: CliSettingsSource[Any] = CliSettingsSource(cls, cli_prog_name=_program(), formatter_class=_Help)
        source.root_parser.usage = "%(prog)s [--FLAG VALUE ...]"
        source.root_parser.epilog = (
            "Each flag is an environment variable too, --heartbeat-ms is FOREBAY_HEARTBEAT_MS; a flag wins over it."
        )
        try:
            return CliApp.run(cls, cli_args=sys.argv[1:] if argv is None else argv, cli_settings_source=source)
        except ValidationError as error:
            problems = [_problem(found) for found in error.errors()]
        except SettingsError as error:
            problems = [str(error).removeprefix("error parsing CLI: ")]
        sys.stderr.write("".join(f"{problem}\n" for problem in problems) + f"{_program()} --help lists all flags\n")
        sys.exit(2)


def _program() -> str:
    """What the user typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else "python -m services.NAME"


def _problem(found: ErrorDetails) -> str:
    flag = str(found["loc"][0]).replace("_", "-") if found["loc"] else ""
    message = found["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("String should match pattern", "must match")
    return f"--{flag}: {message}, not {found['input']!r}"
