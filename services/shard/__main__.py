"""`python -m services.shard`: a stage, configured by `MIAOTUI_SHARD_*`."""

import sys

from services.shard.server import main
from services.shard.settings import ShardSettings

sys.exit(main(ShardSettings()))
