"""Faults as OpenAI's REST protocol shows them: {"error": {message, type, param, code}}."""

import math
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from shared.errors import ContextTooLong, Fault, ModelNotFound, Overloaded, Unauthenticated, Unsupported

# Codes that OpenAI's clients know; other faults' codes are their reasons in lower case.
_CODES: Mapping[type[Fault], str] = {
    ContextTooLong: "context_length_exceeded",
    ModelNotFound: "model_not_found",
    Unauthenticated: "invalid_api_key",
}
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    429: "rate_limit_error",
    499: "request_cancelled",
    504: "timeout_error",
}
_RETRY_LATER = (429, 503)


class HttpFault(Fault):
    """An error of HTTP itself, which exists on no other face: wrong route, method, content type, size."""

    def __init__(self, status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def status_of(fault: Fault) -> int:
    """The HTTP status of a fault."""
    if isinstance(fault, HttpFault):
        return fault.status
    # Clients repeat a request that was answered by 5xx; this one would fail again.
    return 400 if isinstance(fault, Unsupported) else fault.http_status


def body_of(fault: Fault) -> dict[str, Any]:
    """The error object."""
    status = status_of(fault)
    code = fault.code if isinstance(fault, HttpFault) else _CODES.get(type(fault), fault.reason.lower())
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": fault.message, "type": kind, "param": fault.param, "code": code}}


def response_of(fault: Fault) -> Response:
    """The whole response."""
    status, headers = status_of(fault), fault.headers if isinstance(fault, HttpFault) else {}
    if status == 401:
        headers = headers | {"WWW-Authenticate": "Bearer"}
    if status in _RETRY_LATER:
        headers = headers | {"Retry-After": str(_retry_after_s(fault))}
    return Response(orjson.dumps(body_of(fault)), status, headers, "application/json")


def _retry_after_s(fault: Fault) -> int:
    raw = fault.metadata.get("retry_after_ms", "") if isinstance(fault, Overloaded) else ""
    return max(1, math.ceil(int(raw) / 1000)) if raw.isdigit() else 1
