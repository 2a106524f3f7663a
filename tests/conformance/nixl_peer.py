"""A process that owns a pool and serves it over NIXL. Arguments: agent name, pages, bytes per page, seed of `fill`."""

import base64
import json
import sys

from shared.engine.kv.memory import HostMemory
from shared.engine.transfer.nixl import NixlTransport
from tests.conformance.worlds import fill


def main() -> None:
    agent_name, num_pages, page_bytes, seed = sys.argv[1], *(int(arg) for arg in sys.argv[2:5])
    memory = HostMemory(num_pages, page_bytes)
    fill(memory, seed)
    transport = NixlTransport(memory, agent_name)
    transport.serve(3600)
    metadata = base64.b64encode(transport.metadata()).decode()
    sys.stdout.write(json.dumps({"metadata": metadata, "address": memory.address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    transport.close()


if __name__ == "__main__":
    main()
