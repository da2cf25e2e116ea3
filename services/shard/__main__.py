"""`python -m services.shard`: a stage, configured by `MIAOTUI_SHARD_*`."""

import sys

from miaotui.engine.allocator import keep_freed_memory
from miaotui.engine.threads import configure_threads
from services.rpc.settings import load_settings
from services.shard.settings import ShardSettings

if __name__ == "__main__":
    settings = load_settings(ShardSettings)
    configure_threads()  # before torch is imported
    keep_freed_memory()

    from services.shard.server import main

    sys.exit(main(settings))
