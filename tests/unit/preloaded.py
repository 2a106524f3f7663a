"""What a fork server of a test imports."""

import os

IMPORTED_BY = os.getpid()
