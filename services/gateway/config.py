"""Configuration of a gateway."""

from pydantic import Field

from services.gateway.parsers.formats import ReasoningFormat, ToolFormat
from shared.config import ServiceConfig


class GatewayConfig(ServiceConfig):
    """The gateway: OpenAI's REST protocol and GatewayService for clients."""

    http_port: int = Field(8000, ge=0, le=65535, description="Port of the REST server; 0 takes a free one.")
    model: list[str] = Field(
        [],
        description="NAME=PATH: read the tokenizer and chat template of model NAME from PATH instead of the directory "
        "that its workers name. A PATH alone serves the model that is called as the directory. May be repeated.",
    )
    api_key: list[str] = Field(
        [],
        description="KEY=TENANT: clients must send one of these keys as bearer token, which tells whose request it is. "
        "Without any, the X-Forebay-Tenant header tells. May be repeated.",
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
        10_000, ge=0, description="Time that a request waits for a router or, after a fault, a worker to come back."
    )
    max_body_bytes: int = Field(32 << 20, ge=1024, description="Largest request body.")
    max_choices: int = Field(128, ge=1, description="Most outputs of one request: prompts times n.")
    blackboard_interval_ms: int = Field(1_000, ge=50, description="Time between two looks at the blackboard.")
