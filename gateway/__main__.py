"""`python -m gateway`: the gateway, configured by `MIAOTUI_GATEWAY_*` and `REDIS_URL`."""

import sys

from gateway.settings import GatewaySettings
from miaotui.engine.allocator import return_freed_memory
from miaotui.engine.threads import leave_other_cores
from services.rpc.settings import load_settings

if __name__ == "__main__":
    settings = load_settings(GatewaySettings)
    leave_other_cores()  # before numpy is imported
    return_freed_memory()

    from gateway.main import main

    sys.exit(main(settings))
