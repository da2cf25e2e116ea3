"""What a model directory says of how to generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILES = ("generation_config.json", "config.json")


def configured(directory: Path, key: str) -> tuple[Path, Any] | None:
    """Return what `generation_config.json`, or else `config.json`, has under `key`, and the file.

    None: neither says anything; a file that cannot be read says nothing.
    """
    for name in _FILES:
        file = directory / name
        try:
            value = json.loads(file.read_bytes()).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if value is not None:
            return file, value
    return None
