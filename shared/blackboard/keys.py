"""Every Redis key and channel of the suite. Only commands of Redis 7.2 and earlier are used on them.

forebay:epoch:NAME           string  last epoch given to a process; never expires
forebay:members:ROLE         zset    process names by the time (unix ms) of their last registration
forebay:process:ROLE:NAME    string  registration as JSON; expires unless renewed
forebay:index:NAME:EPOCH     set     page hashes (16 bytes each) that a worker has, and COMPLETE; expires with it
forebay:count:NAME:EPOCH     string  how many changes of that set were put on the stream; expires with it
forebay:events               stream  changes of all those sets, the latest ones; expires when nothing changes
forebay:room:NAME:EPOCH      hash    what a worker has room for, has, and was promised; expires with it
forebay:promises:NAME:EPOCH  zset    requests promised to a worker by the time (unix ms) at which that lapses
forebay:queue:MODEL          zset    requests that wait for room, in order
forebay:parked:MODEL         hash    what is known of each of them, as JSON
forebay:shares:MODEL         hash    virtual times and finish tags of the queue's fair shares
forebay:pace:MODEL           hash    how fast requests leave the queue; expires
forebay:waiter:ROUTER        string  present while a router that has requests in a queue is alive; expires
forebay:wake:ROUTER          channel requests of a router that may now have room
forebay:placements           channel what routers have just placed, as JSON, for the other routers
forebay:changes              channel names of processes whose registration came, went or began to drain
"""

from shared.blackboard.records import Role

CHANGES = "forebay:changes"
PLACEMENTS = "forebay:placements"
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


# Prefixes, because only the queue knows which routers to wake.
WAITER = "forebay:waiter:"
WAKE = "forebay:wake:"


def room(name: str, epoch: int) -> str:
    """Room on one incarnation of a worker."""
    return f"forebay:room:{name}:{epoch}"


def promises(name: str, epoch: int) -> str:
    """Requests promised to one incarnation of a worker."""
    return f"forebay:promises:{name}:{epoch}"


def queue(model: str) -> str:
    """Requests that wait for room."""
    return f"forebay:queue:{model}"


def admission(model: str) -> list[str]:
    """The keys of a model's queue, as `admission.lua` takes them."""
    return [queue(model), f"forebay:parked:{model}", f"forebay:shares:{model}", f"forebay:pace:{model}"]
