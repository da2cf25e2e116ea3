"""`python -m services.tokenizer`: the service, configured by `MIAOTUI_TOKENIZER_*`."""

import sys

from services.rpc.settings import load_settings
from services.tokenizer.settings import TokenizerSettings

if __name__ == "__main__":
    settings = load_settings(TokenizerSettings)

    from services.tokenizer.server import main  # takes seconds

    sys.exit(main(settings))
