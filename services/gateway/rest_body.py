"""Reading the body of an HTTP request."""

from codecs import BOM_UTF8
from typing import Any

import orjson
from starlette.requests import Request

from services.gateway.fields import name_of
from services.gateway.rest_errors import HttpFault
from shared.errors import InvalidRequest


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body. Raises InvalidRequest, HttpFault."""
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise HttpFault(
            415, f"Content-Type must be application/json, not {content_type[:100]!r}", "unsupported_media_type"
        )
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise HttpFault(
            415, f"send the body as it is, not with Content-Encoding {encoding[:100]!r}", "unsupported_encoding"
        )
    raw = await _read(request, max_bytes)
    if not raw.strip():
        raise InvalidRequest("the body is empty; it must be a JSON object")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {_defect(raw) or error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {name_of(body)}")
    return body


def _defect(raw: bytes) -> str:
    """What is wrong with the body as text; empty if it is text."""
    if raw.startswith(BOM_UTF8):
        return "it begins with a byte order mark"
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"
    return ""


def _too_large(max_bytes: int) -> HttpFault:
    return HttpFault(413, f"the body must have at most {max_bytes} bytes", "request_too_large")


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)
