"""A gateway: `python -m services.gateway --help`."""

from services.gateway.config import GatewayConfig
from services.gateway.process import run
from shared import entry

if __name__ == "__main__":
    entry.run(run(GatewayConfig.load()))
