"""Calls between processes, each by itself and over a line: faults, deadlines, cancellation, health and reflection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry import trace

from protos.forebay.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, kv_pb2_grpc
from shared import rpc, status, telemetry
from shared.errors import DeadlineExceeded, Fault, Internal, Overloaded, StaleEpoch, Unsupported, WorkerLost
from shared.local_sockets import LocalSockets
from shared.telemetry import Telemetry

RETRY_INFO = error_details_pb2.RetryInfo.DESCRIPTOR


class Kv(kv_pb2_grpc.KvServiceServicer):
    """A servicer that does what each test's request id names."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    async def Acquire(self, request: kv_pb2.AcquireRequest, context: Any) -> kv_pb2.AcquireResponse:
        self.seen["remaining"] = rpc.time_remaining()
        self.seen["request_id"] = telemetry.request_id.get()
        self.seen["trace"] = trace.get_current_span().get_span_context().trace_id
        match request.request_id:
            case "fault":
                raise Overloaded("full", param="model", metadata={"retry_after_ms": "250"})
            case "defect":
                raise ZeroDivisionError("secret")
            case "slow":
                await asyncio.sleep(30)
        return kv_pb2.AcquireResponse()

    async def Connect(self, request: Any, context: Any) -> kv_pb2.ConnectResponse:
        raise StaleEpoch("not me")

    async def Renew(self, request: Any, context: Any) -> kv_pb2.RenewResponse:
        raise StaleEpoch("not me")

    async def Release(self, request: Any, context: Any) -> kv_pb2.ReleaseResponse:
        raise StaleEpoch("not me")


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    """Streams one message and then waits to be cancelled."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:
        try:
            yield decode_pb2.GenerateResponse()
            if request.request_id == "fault":
                raise Overloaded("too late")
            await asyncio.sleep(30)
        finally:
            self.cancelled.set()


class World:
    """A server with both servicers and a client's channels."""

    def __init__(self, *, over_a_line: bool, local: LocalSockets) -> None:
        self._over_a_line = over_a_line
        self.kv, self.decode = Kv(), Decode()
        self.telemetry = Telemetry("test", "test-1")
        self.server = rpc.Server(self.telemetry, ["forebay.v1.KvService", "forebay.v1.DecodeService"], local)
        kv_pb2_grpc.add_KvServiceServicer_to_server(self.kv, self.server.grpc)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self.decode, self.server.grpc)
        self.channels = rpc.Channels(local=local)
        self.address = ""

    @property
    def channel(self) -> grpc.aio.Channel:
        return self.channels.to(self.address)

    def stub(self, kind: Any) -> Any:
        return self.channels.stub(kind, self.address) if self._over_a_line else kind(self.channel)

    async def acquire(self, name: str, timeout_s: float | None = None) -> kv_pb2.AcquireResponse:
        method = self.stub(kv_pb2_grpc.KvServiceStub).Acquire
        response: kv_pb2.AcquireResponse = await rpc.call(method, kv_pb2.AcquireRequest(request_id=name), timeout_s)
        return response


@pytest.fixture(params=["by itself", "over a line", "over a line with a pipe"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    local = LocalSockets(str(tmp_path) if "pipe" in request.param else "")
    world = World(over_a_line="line" in request.param, local=local)
    world.address = f"127.0.0.1:{await world.server.start('127.0.0.1', 0)}"
    yield world
    await world.channels.close()
    await world.server.stop(0)
    world.telemetry.close()


async def test_channels_to_processes_that_are_gone_are_forgotten_and_those_in_use_are_not(world: World) -> None:
    now = 0.0
    channels = rpc.Channels(clock=lambda: now)
    stub: Any = channels.stub(decode_pb2_grpc.DecodeServiceStub, world.address)
    async with aclosing(rpc.stream(stub.Generate, decode_pb2.GenerateRequest(request_id="long"))) as responses:
        await anext(responses)
        channels.to("127.0.0.1:1")
        now = rpc.UNUSED_S + 1
        channels.to("127.0.0.1:2")
        assert channels.addresses == [world.address, "127.0.0.1:2"]
        assert channels.stub(decode_pb2_grpc.DecodeServiceStub, world.address) is stub
        assert not world.decode.cancelled.is_set()
    await channels.close()
    assert not channels.addresses


async def test_a_fault_arrives_as_the_fault_that_was_raised(world: World) -> None:
    with pytest.raises(Overloaded) as caught:
        await world.acquire("fault")
    assert caught.value.message == "full"
    assert caught.value.param == "model"
    assert caught.value.metadata == {"retry_after_ms": "250"}


async def test_a_fault_that_says_when_to_come_back_has_retry_info(world: World) -> None:
    stub: Any = kv_pb2_grpc.KvServiceStub(world.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Acquire(kv_pb2.AcquireRequest(request_id="fault"))
    details = dict(caught.value.trailing_metadata() or ())[status.DETAILS_KEY]
    found = [detail for detail in status_pb2.Status.FromString(details).details if detail.Is(RETRY_INFO)]
    assert len(found) == 1
    retry = error_details_pb2.RetryInfo.FromString(found[0].value)
    assert retry.retry_delay.ToMilliseconds() == 250


async def test_a_defect_tells_the_caller_nothing_of_itself(world: World) -> None:
    with pytest.raises(Internal) as caught:
        await world.acquire("defect")
    assert "secret" not in caught.value.message


async def test_a_fault_amid_a_stream_follows_what_was_sent_before(world: World) -> None:
    stub = world.stub(decode_pb2_grpc.DecodeServiceStub)
    responses = rpc.stream(stub.Generate, decode_pb2.GenerateRequest(request_id="fault"))
    assert await anext(responses) == decode_pb2.GenerateResponse()
    with pytest.raises(Overloaded):
        await anext(responses)


async def test_leaving_a_stream_early_cancels_its_handler(world: World) -> None:
    stub = world.stub(decode_pb2_grpc.DecodeServiceStub)
    async with aclosing(rpc.stream(stub.Generate, decode_pb2.GenerateRequest())) as responses:
        async for _ in responses:
            break
    await asyncio.wait_for(world.decode.cancelled.wait(), 5)


async def test_the_deadline_of_the_work_at_hand_reaches_the_callee(world: World) -> None:
    with rpc.deadline(7.0):
        await world.acquire("ok", timeout_s=60.0)
    assert 0.0 < world.kv.seen["remaining"] < 8.0  # the wire rounds up


async def test_a_passed_deadline_is_a_fault_with_a_reason(world: World) -> None:
    with pytest.raises(DeadlineExceeded):
        await world.acquire("slow", timeout_s=0.05)
    with rpc.deadline(-1.0), pytest.raises(DeadlineExceeded):
        await world.acquire("ok")


async def test_request_id_and_trace_context_travel(world: World) -> None:
    telemetry.request_id.set("r-1")
    with world.telemetry.tracer.start_as_current_span("root") as span:
        await world.acquire("ok")
    assert world.kv.seen["request_id"] == "r-1"
    assert world.kv.seen["trace"] == span.get_span_context().trace_id


async def test_a_server_that_is_gone_is_a_lost_worker(world: World) -> None:
    await world.server.stop(0)
    with pytest.raises(WorkerLost):
        await world.acquire("ok", timeout_s=5)


async def test_a_method_that_nobody_wrote_is_unsupported(world: World) -> None:
    method: Any = world.channel.unary_unary("/forebay.v1.KvService/Nothing", request_serializer=lambda m: b"")
    with pytest.raises(Unsupported):
        await rpc.call(method, None)


async def test_health_follows_draining(world: World) -> None:
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    request = health_pb2.HealthCheckRequest(service="forebay.v1.KvService")
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    await world.server.set_serving(False)
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def listed(channel: grpc.aio.Channel) -> set[str]:
    """The services that a server says it has, but for the protocols that all have."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def requests() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    [answer] = [answer async for answer in stub.ServerReflectionInfo(requests())]
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    return {name for name in names if name.startswith("forebay.")}


async def test_reflection_lists_the_services(world: World) -> None:
    assert await listed(world.channel) == {f"forebay.v1.{name}Service" for name in ("Kv", "Decode", "Line")}


async def test_a_face_for_users_lists_and_takes_no_lines(world: World) -> None:
    server = rpc.Server(world.telemetry, ["forebay.v1.KvService"], takes_lines=False)
    kv_pb2_grpc.add_KvServiceServicer_to_server(Kv(), server.grpc)
    channels, address = rpc.Channels(), f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    try:
        assert await listed(channels.to(address)) == {"forebay.v1.KvService"}
        over_a_line = channels.stub(kv_pb2_grpc.KvServiceStub, address)
        with pytest.raises(WorkerLost, match="takes no lines"):
            await rpc.call(over_a_line.Acquire, kv_pb2.AcquireRequest())
    finally:
        await channels.close()
        await server.stop(0)


def test_every_reason_of_the_protocol_has_a_fault() -> None:
    from protos.forebay.v1 import errors_pb2
    from shared.errors import FAULTS

    values = errors_pb2.DESCRIPTOR.enum_types_by_name["FaultReason"].values
    reasons = {value.name.removeprefix("FAULT_REASON_") for value in values} - {"UNSPECIFIED"}
    assert reasons == set(FAULTS)
    assert all(grpc.StatusCode[kind.grpc_status] for kind in FAULTS.values())
    assert issubclass(FAULTS["OVERLOADED"], Fault)
