"""Reads a service's settings, or says what is wrong with them and exits."""

from __future__ import annotations

import sys
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings

Settings = TypeVar("Settings", bound=BaseSettings)


def load_settings(kind: type[Settings]) -> Settings:
    """Settings from the environment; exits with code 2 and a line a fault where they are wrong."""
    try:
        return kind()
    except ValidationError as error:
        prefix = str(kind.model_config.get("env_prefix", ""))
        for fault in error.errors(include_url=False, include_input=False):
            where = ".".join(str(part) for part in fault["loc"])
            # A field with a name of its own in the environment is called by that name already.
            own = where.isupper() and not where.startswith(prefix)
            name = (where if own else f"{prefix}{where}".upper()) if where else "settings"
            print(f"{name}: {fault['msg']}", file=sys.stderr)
        sys.exit(2)
