"""Faults on the wire: a gRPC status with a google.rpc.ErrorInfo (domain "forebay", reason, metadata)."""

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from shared.errors import FAULTS, Cancelled, DeadlineExceeded, Fault, Internal, Overloaded, Unsupported, WorkerLost

DOMAIN = "forebay"
DETAILS_KEY = "grpc-status-details-bin"

_BARE_STATUS: dict[grpc.StatusCode, type[Fault]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: WorkerLost,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
}


def fault_of(error: grpc.aio.AioRpcError) -> Fault:
    """The fault that a failed call means: the callee's own if it sent one, else the one of the bare status."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes) and (fault := read(value)):
            return fault
    return _BARE_STATUS.get(error.code(), Internal)(error.details() or error.code().name)


def read(details: bytes) -> Fault | None:
    """The fault that a serialized status tells of; None if it has no ErrorInfo of ours."""
    info = error_details_pb2.ErrorInfo()
    try:
        status = status_pb2.Status.FromString(details)
    except DecodeError:
        return None
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            metadata = dict(info.metadata)
            param = metadata.pop("param", None)
            return FAULTS.get(info.reason, Internal)(status.message, param=param, metadata=metadata)
    return None


def write(fault: Fault) -> bytes:
    """A fault as a serialized status, with a RetryInfo if it says when to come back."""
    metadata = fault.metadata | ({"param": fault.param} if fault.param else {})
    info = error_details_pb2.ErrorInfo(reason=fault.reason, domain=DOMAIN, metadata=metadata)
    status = status_pb2.Status(code=code_pb2.Code.Value(fault.grpc_status), message=fault.message)
    status.details.add().Pack(info)
    if retry_after_ms := fault.metadata.get("retry_after_ms"):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(retry_after_ms))
        status.details.add().Pack(retry)
    return bytes(status.SerializeToString())
