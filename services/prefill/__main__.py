"""A prefill worker: `python -m services.prefill --help`."""

from protos.forebay.v1 import prefill_pb2_grpc
from services.prefill.servicer import PrefillServicer
from shared import entry, rpc
from shared.blackboard.records import Role
from shared.worker import process, rank_process
from shared.worker.config import WorkerConfig
from shared.worker.worker import Worker


def _add(worker: Worker, server: rpc.Server) -> None:
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(worker), server.grpc)


if __name__ == "__main__":
    config = WorkerConfig.load()
    ranks = rank_process.forked(config)
    entry.run(process.serve(Role.PREFILL, config, {"forebay.v1.PrefillService": _add}, ranks))
