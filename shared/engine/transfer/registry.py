"""Which transport a name means."""

from shared.engine.kv.memory import PoolMemory
from shared.engine.transfer.api import Transport


def transport(name: str, memory: PoolMemory, agent_name: str) -> Transport:
    """The transport called `name` ("nixl" or "local") over `memory`."""
    if name == "nixl":
        from shared.engine.transfer.nixl import NixlTransport

        return NixlTransport(memory, agent_name)
    from shared.engine.transfer.local import LocalTransport

    return LocalTransport(memory, agent_name, {})
