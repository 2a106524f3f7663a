"""Configuration of a gateway."""

from typing import Annotated

from pydantic import AfterValidator, Field

from services.gateway.parsers.formats import ReasoningFormat, ToolFormat
from shared.config import ServiceConfig, StringList


def _with_keys(entries: list[str]) -> list[str]:
    if any(entry.startswith("=") for entry in entries):
        raise ValueError("each entry must be KEY or KEY=TENANT")
    return entries


class GatewayConfig(ServiceConfig):
    """The gateway: OpenAI's REST protocol and GatewayService for clients."""

    http_port: int = Field(8000, ge=0, le=65535, description="Port of the REST server; 0 takes a free one.")
    tokenizer: StringList = Field(
        [],
        description="NAME=PATH: read the tokenizer and chat template of model NAME from PATH instead of the directory "
        "that its workers name. A PATH alone serves the model that is called as the directory. May be repeated.",
    )
    api_key: Annotated[StringList, AfterValidator(_with_keys)] = Field(
        [],
        description="KEY or KEY=TENANT: clients must send one of these keys as bearer token, over REST and gRPC. It "
        "tells whose request it is; a KEY alone, or no key at all, leaves that to the X-Forebay-Tenant header. May be "
        "repeated.",
    )
    allow_origin: StringList = Field(
        ["*"],
        description="Web sites whose pages may call this server from a browser (CORS), like https://app.example.org; "
        "* is any, an empty one none. May be repeated.",
    )
    reasoning_parser: ReasoningFormat = Field(
        "auto",
        description="How models write reasoning: think (<think> tags), none, or auto: as their chat template does.",
    )
    tool_parser: ToolFormat = Field(
        "auto",
        description="How models write tool calls: glm, hermes (JSON in <tool_call> tags; Qwen3 too), none, or auto: "
        "as their template does.",
    )
    request_timeout_ms: int = Field(
        600_000, ge=1, description="Deadline of requests that name none in the X-Forebay-Timeout-Ms header."
    )
    recovery_wait_ms: int = Field(
        30_000,
        ge=0,
        description="Time that a request waits, within its deadline, for a router or, after a fault, a worker to come "
        "back.",
    )
    max_body_bytes: int = Field(32 << 20, ge=1024, description="Largest request body.")
    max_choices: int = Field(128, ge=1, description="Most outputs of one request: prompts times n.")
    blackboard_interval_ms: int = Field(1_000, ge=50, description="Time between two looks at the blackboard.")
