"""Every fault of the suite.

    Fault                       an error with a reason that a client may see
    ├── InvalidRequest          the request itself is wrong
    ├── Unauthenticated         the caller may not come in: no valid API key
    ├── ModelNotFound           nobody serves the model
    ├── ContextTooLong          prompt and output do not fit the context
    ├── NoWorker                no fitting worker is there
    ├── Overloaded              every fitting worker is full
    ├── DeadlineExceeded        the deadline passed or cannot be met
    ├── Cancelled               the caller went away
    ├── Draining                the process takes no new work
    ├── WorkerLost              a worker died, restarted or stopped answering
    ├── StaleEpoch              an earlier incarnation of a worker was addressed
    ├── Incompatible            two workers cannot exchange pages
    ├── BadManifest             a handoff is incomplete or contradicts the layout
    ├── TransferFailed          pages could not be read
    ├── CorruptPages            pages were read, but their bytes are not those that the owner has
    ├── BlackboardLost          Redis cannot be reached
    ├── Unsupported             the model or this build cannot do it
    └── Internal                a defect of ours

`protos/forebay/v1/errors.proto` lists the same reasons. Two boundaries map faults to the wire: `shared/status.py` to
a gRPC status with ErrorInfo and back, `services/gateway/rest_errors.py` to OpenAI's error body.
"""

from collections.abc import Mapping
from typing import ClassVar


class Fault(Exception):
    """An error with a reason. `metadata` is for machines (ErrorInfo.metadata), the message for people.

    `param` names the request field at fault, where one is.
    """

    reason: ClassVar[str] = "INTERNAL"
    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.metadata = dict(metadata or {})


class InvalidRequest(Fault):
    reason, grpc_status, http_status = "INVALID_REQUEST", "INVALID_ARGUMENT", 400


class Unauthenticated(Fault):
    reason, grpc_status, http_status = "UNAUTHENTICATED", "UNAUTHENTICATED", 401


class ModelNotFound(Fault):
    reason, grpc_status, http_status = "MODEL_NOT_FOUND", "NOT_FOUND", 404


class ContextTooLong(Fault):
    reason, grpc_status, http_status = "CONTEXT_TOO_LONG", "INVALID_ARGUMENT", 400


class NoWorker(Fault):
    reason, grpc_status, http_status = "NO_WORKER", "UNAVAILABLE", 503


class Overloaded(Fault):
    """Metadata `retry_after_ms` says when to come back."""

    reason, grpc_status, http_status = "OVERLOADED", "RESOURCE_EXHAUSTED", 429


class DeadlineExceeded(Fault):
    reason, grpc_status, http_status = "DEADLINE", "DEADLINE_EXCEEDED", 504


class Cancelled(Fault):
    reason, grpc_status, http_status = "CANCELLED", "CANCELLED", 499


class Draining(Fault):
    reason, grpc_status, http_status = "DRAINING", "UNAVAILABLE", 503


class WorkerLost(Fault):
    reason, grpc_status, http_status = "WORKER_LOST", "UNAVAILABLE", 503


class StaleEpoch(Fault):
    reason, grpc_status, http_status = "STALE_EPOCH", "FAILED_PRECONDITION", 503


class Incompatible(Fault):
    reason, grpc_status, http_status = "INCOMPATIBLE", "FAILED_PRECONDITION", 500


class BadManifest(Fault):
    reason, grpc_status, http_status = "BAD_MANIFEST", "DATA_LOSS", 500


class TransferFailed(Fault):
    reason, grpc_status, http_status = "TRANSFER_FAILED", "UNAVAILABLE", 503


class CorruptPages(Fault):
    reason, grpc_status, http_status = "CORRUPT_PAGES", "DATA_LOSS", 500


class BlackboardLost(Fault):
    reason, grpc_status, http_status = "BLACKBOARD_LOST", "UNAVAILABLE", 503


class Unsupported(Fault):
    reason, grpc_status, http_status = "UNSUPPORTED", "UNIMPLEMENTED", 501


class Internal(Fault):
    reason, grpc_status, http_status = "INTERNAL", "INTERNAL", 500


FAULTS: Mapping[str, type[Fault]] = {kind.reason: kind for kind in Fault.__subclasses__()}
