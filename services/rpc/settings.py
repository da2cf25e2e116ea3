"""What the services behind a gateway have in common, and the reading of settings."""

from __future__ import annotations

import sys
from typing import TypeVar

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings

from services.rpc.tls import TlsSettings

Settings = TypeVar("Settings", bound=BaseSettings)

_SHORTEST_KEY = 32


class InnerSettings(TlsSettings):
    """What tokenizer and shards take."""

    traces_to: str = Field(
        default="",
        validation_alias=AliasChoices("MIAOTUI_TRACES_TO"),
        description="host:port of the gateway's gRPC API, to show recent traces; empty: no traces, "
        "unless OTEL_EXPORTER_OTLP_ENDPOINT names a collector",
    )


def check_encryption_key(name: str, key: SecretStr | None) -> None:
    """Refuses a key that is too short to encrypt by; raises `ValueError`."""
    if key is not None and len(key.get_secret_value()) < _SHORTEST_KEY:
        raise ValueError(
            f"{name} must have at least {_SHORTEST_KEY} characters, such as those of "
            "`openssl rand -hex 32`"
        )


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
