"""A decode worker: `python -m services.decode --help`."""

from protos.forebay.v1 import decode_pb2_grpc
from services.decode.servicer import DecodeServicer
from shared import entry, rpc
from shared.blackboard.records import Role
from shared.worker import process, rank_process
from shared.worker.config import WorkerConfig
from shared.worker.worker import Worker


def _add(worker: Worker, server: rpc.Server) -> None:
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker), server.grpc)


if __name__ == "__main__":
    config = WorkerConfig.load()
    ranks = rank_process.forked(config)
    entry.run(process.serve(Role.DECODE, config, {"forebay.v1.DecodeService": _add}, ranks))
