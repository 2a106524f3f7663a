"""The outermost frame of a process: its event loop, and how it ends if it cannot start."""

import logging
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn

import uvloop

from shared.errors import Fault

log = logging.getLogger(__name__)


def run(main: Coroutine[Any, Any, int | None]) -> NoReturn:
    """Run a process; its result is the exit status, None for 0.

    What a person can mend, a Fault or what the system refuses (a taken port, a full disk), is told in one sentence; its
    traceback is logged at level DEBUG. Anything else is a defect, whose traceback is shown.
    """
    try:
        status = uvloop.run(main)
    except (Fault, OSError) as error:
        log.debug("the process ends", exc_info=True)
        sys.exit(str(error))
    sys.exit(status or 0)
