"""`python -m gateway`: the gateway, configured by `MIAOTUI_GATEWAY_*` and `REDIS_URL`."""

import sys

from gateway.main import main
from gateway.settings import GatewaySettings
from services.rpc.settings import load_settings

sys.exit(main(load_settings(GatewaySettings)))
