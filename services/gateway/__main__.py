"""`python -m services.gateway`."""

import sys

import uvloop

from services.gateway.config import GatewayConfig
from services.gateway.process import run


def main() -> None:
    """Run a gateway."""
    config = GatewayConfig.load()
    try:
        uvloop.run(run(config))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
