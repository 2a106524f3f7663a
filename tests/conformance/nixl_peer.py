"""A process that owns a pool and serves it over NIXL. Arguments: agent name, pages, bytes per page, seed of `fill`, and
the pool's device if it is not the CPU."""

import base64
import json
import sys

from shared.engine.kv.memory import HostMemory, PoolMemory
from shared.engine.transfer.nixl import NixlTransport
from tests.conformance.worlds import fill


def pool_memory(num_pages: int, page_bytes: int, device: str = "cpu", seed: int | None = None) -> PoolMemory:
    """A pool on a device, filled if there is a seed."""
    host = HostMemory(num_pages, page_bytes)
    if seed is not None:
        fill(host, seed)
    if device == "cpu":
        return host
    import torch

    from shared.engine.kv.view import DeviceMemory, pool_bytes

    memory = DeviceMemory(num_pages, page_bytes, torch.device(device, 0))
    memory.bytes.copy_(pool_bytes(host))
    return memory


def main() -> None:
    agent_name, num_pages, page_bytes, seed = sys.argv[1], *(int(arg) for arg in sys.argv[2:5])
    memory = pool_memory(num_pages, page_bytes, sys.argv[5] if len(sys.argv) > 5 else "cpu", seed)
    transport = NixlTransport(memory, agent_name)
    transport.serve(3600)
    metadata = base64.b64encode(transport.metadata()).decode()
    told = {"metadata": metadata, "address": memory.address, "kind": memory.kind}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    transport.close()


if __name__ == "__main__":
    main()
