"""The REST face: OpenAI's protocol."""

import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway import responses
from services.gateway.api_keys import ApiKeys
from services.gateway.core import Core
from services.gateway.models import ServedModel
from services.gateway.request import Caller, Job
from services.gateway.rest_answer import Answer, Writer
from services.gateway.rest_bodies import Bodies
from services.gateway.rest_body import read_object
from services.gateway.rest_errors import HttpFault, response_of
from services.gateway.rest_responses import Responses
from shared import telemetry
from shared.errors import Fault, Internal, InvalidRequest
from shared.telemetry import Telemetry
from shared.version import version

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
TENANT = "x-forebay-tenant"
TIMEOUT = "x-forebay-timeout-ms"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_PAGE = Path(__file__).with_name("page.html")

MODEL, RESPONSE = "/v1/models/", "/v1/responses/"
MakeJob = Callable[[Mapping[str, object], Caller], Awaitable[Job]]


class Route(NamedTuple):
    """What answers a path. The open ones need no API key."""

    method: str
    endpoint: Callable[[Request], Awaitable[ASGIApp]]
    is_open: bool = False


class Rest:
    """An ASGI application.

    It finds the endpoint itself: a framework's router and middleware cost a request 0.2 ms, and each chunk of its
    answer three calls.
    """

    def __init__(
        self,
        core: Core,
        telemetry: Telemetry,
        *,
        keys: ApiKeys,
        timeout_ms: int,
        max_body_bytes: int,
    ) -> None:
        self._core, self._telemetry, self._keys = core, telemetry, keys
        self._timeout_ms, self._max_body_bytes = timeout_ms, max_body_bytes
        self._page = _PAGE.read_bytes()
        self._routes = {
            "/v1/chat/completions": Route("POST", self._chat),
            "/v1/completions": Route("POST", self._complete),
            "/v1/responses": Route("POST", self._create_response),
            "/v1/responses/input_tokens": Route("POST", self._count_input),
            "/v1/models": Route("GET", self._models),
            "/tokenize": Route("POST", self._tokenize),
            "/detokenize": Route("POST", self._detokenize),
            "/version": Route("GET", self._version, is_open=True),
            "/health": Route("GET", self._health, is_open=True),
            "/metrics": Route("GET", self._metrics, is_open=True),
            "/": Route("GET", self._chat_page, is_open=True),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Each request has an id, the client's own if it sent one, which the response repeats."""
        request = Request(scope, receive)
        given = request.headers.get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        telemetry.request_id.set(request_id)
        header = (REQUEST_ID.encode(), request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._routes else "other"
                self._core.meters.responded(path, message["status"])
                message["headers"] = [*message["headers"], header]
            await send(message)

        response = await self._respond(request)
        await response(scope, receive, send_with_id)

    async def _respond(self, request: Request) -> ASGIApp:
        """Let in who may come; turn faults and defects into responses."""
        try:
            method, endpoint, is_open = self._find(request.scope["path"])
            if request.method != method and (request.method, method) != ("HEAD", "GET"):
                message = f"{request.method} is not allowed on {request.scope['path']}"
                raise HttpFault(405, message, "method_not_allowed", {"Allow": method})
            if not is_open:
                request.scope[TENANT] = self._tenant(request)
            return await endpoint(request)
        except Fault as fault:
            log.info("fault %s: %s", fault.reason, fault.message)
            return response_of(fault)
        except Exception:
            log.exception("defect in %s", request.scope["path"])
            return response_of(Internal("internal error; the log of the gateway has the details"))

    def _find(self, path: str) -> Route:
        path = path.rstrip("/") or "/"
        route = self._routes.get(path)
        if route is None and path.startswith(MODEL):
            route = Route("GET", self._model)
        if route is None and path.startswith(RESPONSE):
            reason = "nothing is kept of a response once it is answered"
            raise HttpFault(404, f"there is no {path[:200]} here: {reason}", "not_found")
        if route is None:
            hint = (
                f"did you mean /v1{path}?" if f"/v1{path}" in self._routes else f"there are {', '.join(self._routes)}"
            )
            raise HttpFault(404, f"there is no {path[:200]} here; {hint}", "not_found")
        return route

    async def _chat(self, request: Request) -> ASGIApp:
        return await self._generate(request, self._core.chat, lambda job, _: Bodies(job))

    async def _complete(self, request: Request) -> ASGIApp:
        return await self._generate(request, self._core.complete, lambda job, _: Bodies(job))

    async def _create_response(self, request: Request) -> ASGIApp:
        return await self._generate(
            request, self._core.respond, lambda job, raw: Responses(job, responses.settled(raw, job.model))
        )

    async def _generate(
        self, request: Request, make_job: MakeJob, writer: Callable[[Job, Mapping[str, object]], Writer]
    ) -> ASGIApp:
        caller = Caller(telemetry.request_id.get(), request.scope[TENANT], self._timeout_s(request))
        raw = await read_object(request, self._max_body_bytes)
        job = await make_job(raw, caller)
        return _Served(Answer(job, self._core.run, writer(job, raw)), self._core, self._telemetry, request)

    async def _count_input(self, request: Request) -> Response:
        num_tokens = await self._core.count_input(await read_object(request, self._max_body_bytes))
        return _json({"object": "response.input_tokens", "input_tokens": num_tokens})

    async def _models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [_describe(model) for model in self._core.directory.models]})

    async def _model(self, request: Request) -> Response:
        return _json(_describe(self._core.directory.model(request.scope["path"].rstrip("/").removeprefix(MODEL))))

    async def _tokenize(self, request: Request) -> Response:
        found = await self._core.tokenize(await read_object(request, self._max_body_bytes))
        body = {"count": len(found.ids), "max_model_len": found.max_model_len, "tokens": found.ids}
        return _json(body | {"token_strs": found.texts})

    async def _detokenize(self, request: Request) -> Response:
        return _json({"prompt": await self._core.detokenize(await read_object(request, self._max_body_bytes))})

    async def _version(self, _request: Request) -> Response:
        return _json({"version": version()})

    async def _health(self, _request: Request) -> Response:
        problem = "draining" if self._core.draining else self._core.directory.problem()
        if problem:
            return _json({"status": "unavailable", "reason": problem}, 503)
        return _json({"status": "ok", "models": [model.name for model in self._core.directory.models]})

    async def _metrics(self, _request: Request) -> Response:
        return Response(generate_latest(self._telemetry.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _chat_page(self, _request: Request) -> Response:
        return Response(self._page, media_type="text/html")

    def _tenant(self, request: Request) -> str:
        """Whose request it is. Raises Unauthenticated."""
        named = request.headers.get(TENANT, "")
        if len(named) > 256:
            raise InvalidRequest("the X-Forebay-Tenant header must have at most 256 characters", param=TENANT)
        return self._keys.tenant(request.headers.get("authorization", ""), named)

    def _timeout_s(self, request: Request) -> float:
        raw = request.headers.get(TIMEOUT)
        if raw is None:
            return self._timeout_ms / 1000
        if not raw.isascii() or not raw.isdigit() or len(raw) > 9 or int(raw) == 0:
            raise InvalidRequest("the X-Forebay-Timeout-Ms header must be a whole number above 0", param=TIMEOUT)
        return min(int(raw), self._timeout_ms) / 1000


class _Served:
    """An answer that counts as running, inside a span that continues the client's trace."""

    def __init__(self, answer: Answer, core: Core, telemetry: Telemetry, request: Request) -> None:
        self._answer, self._core, self._telemetry, self._request = answer, core, telemetry, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        about = {"http.request.method": "POST", "http.route": scope["path"], "forebay.model": self._answer.model}
        span = self._telemetry.begin(f"POST {scope['path']}", self._request.headers, about)
        try:
            with self._core.admitted():
                await self._answer(scope, receive, send)
        except Fault as fault:
            telemetry.failed(fault)
            await response_of(fault)(scope, receive, send)
        finally:
            span.end()


def _describe(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "forebay",
        "max_model_len": model.card.max_model_len,
    }


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
