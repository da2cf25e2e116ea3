"""`python -m services.tokenizer`: the service, configured by `MIAOTUI_TOKENIZER_*`."""

import sys

from miaotui.engine.allocator import return_freed_memory
from services.rpc.settings import load_settings
from services.tokenizer.settings import TokenizerSettings

if __name__ == "__main__":
    settings = load_settings(TokenizerSettings)
    return_freed_memory()

    from services.tokenizer.server import main  # takes seconds

    sys.exit(main(settings))
