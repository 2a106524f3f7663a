"""Every Redis key and channel of the suite. Only commands of Redis 7.2 and earlier are used on them.

forebay:epoch:NAME           string  last epoch given to a process; never expires
forebay:members:ROLE         zset    process names by the time (unix ms) of their last registration
forebay:process:ROLE:NAME    string  registration as JSON; expires unless renewed
forebay:index:NAME:EPOCH     set     page hashes (16 bytes each) that a worker has, and COMPLETE; expires with it
forebay:count:NAME:EPOCH     string  how many changes of that set were put on the stream; expires with it
forebay:events               stream  changes of all those sets, the latest ones; expires when nothing changes
forebay:changes              channel names of processes whose registration came, went or began to drain
"""

from shared.blackboard.records import Role

CHANGES = "forebay:changes"
EVENTS = "forebay:events"
# A member of every index that was written whole. After Redis lost its data, increments alone would make an index that
# looks right and misses most pages: without this member it counts as absent.
COMPLETE = ""


def epoch(name: str) -> str:
    """Last epoch of a process."""
    return f"forebay:epoch:{name}"


def members(role: Role) -> str:
    """Names of the processes of a role."""
    return f"forebay:members:{role}"


def process(role: Role, name: str) -> str:
    """Registration of a process; `name` may be a pattern for SORT ... GET."""
    return f"forebay:process:{role}:{name}"


def index(name: str, epoch: int) -> str:
    """Page hashes of one incarnation of a worker."""
    return f"forebay:index:{name}:{epoch}"


def index_snapshot(name: str, epoch: int) -> str:
    """Where a whole index is written before it takes the place of the old one."""
    return f"forebay:index:{name}:{epoch}:new"


def index_count(name: str, epoch: int) -> str:
    """Changes of an index so far."""
    return f"forebay:count:{name}:{epoch}"
