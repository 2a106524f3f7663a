"""Configuration of a process: a frozen object whose fields are at once flags and environment variables.

Field `lease_ttl_ms` is flag `--lease-ttl-ms` and variable `FOREBAY_LEASE_TTL_MS`; a flag wins over a variable. It is
read once, at start, and a wrong value ends the process with a message. `--help` is made of the fields' descriptions.
"""

import sys
from typing import Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict


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
    )

    host: str = Field("127.0.0.1", description="Interface to listen on, and the host that others are told to use.")
    port: int = Field(0, ge=0, le=65535, description="Port of the gRPC server; 0 takes a free one.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 takes a free one.")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis, or any server with its protocol.")
    name: str = Field("", description="Stable name of this process; empty makes one from role and host.")
    heartbeat_ms: int = Field(500, ge=50, description="Time between two registrations on the blackboard.")
    registration_ttl_ms: int = Field(
        2_000, ge=200, description="A process that has not registered for this long is considered gone."
    )
    drain_grace_ms: int = Field(
        30_000, ge=0, description="Time that running requests have to finish after SIGTERM, before they are ended."
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")
    traces: str = Field("none", pattern="^(none|console|otlp)$", description="Where spans go: none, console or otlp.")

    @classmethod
    def load(cls, argv: list[str] | None = None) -> Self:
        """The configuration from flags and environment; ends the process with a message if it is wrong."""
        try:
            return CliApp.run(cls, cli_args=sys.argv[1:] if argv is None else argv)
        except ValidationError as error:
            for problem in error.errors():
                flag = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
                sys.stderr.write(f"{flag}: {problem['msg']}\n")
            sys.exit(2)
