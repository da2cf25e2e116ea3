"""Settings of the gateway, from the environment (`MIAOTUI_GATEWAY_*`, `REDIS_URL`)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from services.rpc.tls import TlsSettings

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positive = Annotated[int, Field(gt=0)]


class GatewaySettings(TlsSettings):
    """Everything that an operator can set; each has an environment variable of its name."""

    model_config = SettingsConfigDict(
        env_prefix="MIAOTUI_GATEWAY_", extra="ignore", frozen=True, populate_by_name=True
    )

    http_listen: str = Field(default="127.0.0.1:8080", description="host:port of the HTTP API")
    grpc_listen: str = Field(default="127.0.0.1:50050", description="host:port of the gRPC API")
    tokenizer: str = Field(
        default="127.0.0.1:50051",
        description="host:port of the tokenizer service of the model that finds spans; empty: none",
    )
    shard: str = Field(
        default="127.0.0.1:50060", description="host:port of that model's stage 0; empty: none"
    )
    generator_tokenizer: str = Field(
        default="",
        description="host:port of the tokenizer service of the model that writes; empty: none",
    )
    generator_shard: str = Field(
        default="", description="host:port of that model's stage 0; empty: none"
    )

    documents: str = Field(
        default="", description="directory of the users' documents; empty: the user's data folder"
    )
    max_upload_bytes: Positive = Field(
        default=64 * 1024 * 1024, description="largest upload of documents"
    )
    max_document_characters: Positive = Field(
        default=5_000_000, description="longest text of one document"
    )
    reading_timeout: Seconds = Field(
        default=120.0, description="seconds that reading one document may take"
    )

    max_body_bytes: Positive = Field(default=1024 * 1024, description="larger bodies get 413")
    max_question_characters: Positive = Field(default=4_000, description="longest question")
    max_context_characters: Positive = Field(default=500_000, description="longest passage")
    max_batch_items: Positive = Field(default=256, description="most questions of one batch")
    batch_concurrency: Positive = Field(
        default=16, description="items of one batch computed at once"
    )
    max_concurrent_requests: Positive = Field(
        default=256, description="requests worked on at once; more get 503 with Retry-After"
    )
    request_timeout: Seconds = Field(
        default=10.0, description="seconds, where the caller sets none"
    )
    max_request_timeout: Seconds = Field(
        default=60.0, description="seconds, most that a caller may set"
    )
    generation_timeout: Seconds = Field(
        default=120.0, description="seconds for a generated text, where the caller sets none"
    )
    max_generation_timeout: Seconds = Field(
        default=600.0, description="seconds, most that a caller may set for a generated text"
    )
    max_texts: Positive = Field(
        default=64, description="most texts that one request may ask for (n, times its prompts)"
    )
    body_timeout: Seconds = Field(
        default=10.0, description="seconds within which a body must arrive"
    )
    drain_seconds: Seconds = Field(
        default=10.0, description="seconds for running requests at shutdown"
    )
    poll_seconds: Seconds = Field(default=2.0, description="seconds between looks at the services")

    redis_url: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("MIAOTUI_GATEWAY_REDIS_URL", "REDIS_URL", "redis_url"),
        description="Redis to cache in; absent: memory of this process",
    )
    cache_ttl_seconds: Positive = Field(default=3600, description="how long answers are kept")
    answer_cache_bytes: Positive = Field(
        default=64 * 1024 * 1024, description="embedded cache only"
    )
    prompt_cache_bytes: Positive = Field(
        default=64 * 1024 * 1024, description="embedded cache only"
    )
    cache_value_bytes: Positive = Field(
        default=1024 * 1024, description="larger values are not kept"
    )
    cache_timeout: Seconds = Field(default=0.02, description="seconds for one cache operation")
    cache_secret: SecretStr = Field(
        default_factory=lambda: SecretStr(secrets.token_hex(32)),
        description="keys the cache's hashes; gateways that share a cache must share it",
    )

    https: bool = Field(
        default=False, description="HTTP over TLS, with the certificate of MIAOTUI_TLS_DIR"
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe records that are logged"
    )

    @field_validator("http_listen", "grpc_listen")
    @classmethod
    def _check_listen(cls, listen: str) -> str:
        split_listen(listen)
        return listen

    @property
    def longest_timeout(self) -> float:
        """Most seconds that a caller may set for a question, of whatever mode."""
        if self.generator_shard:
            return max(self.max_request_timeout, self.max_generation_timeout)
        return self.max_request_timeout

    @property
    def documents_directory(self) -> Path:
        """Where the users' documents are kept."""
        if self.documents:
            return Path(self.documents).expanduser()
        data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
        return Path(data).expanduser() / "miaotui" / "documents"

    @property
    def shares_cache(self) -> bool:
        """Whether other gateways may use the same cache: a random secret is nobody else's."""
        return self.redis_url is not None and "cache_secret" in self.model_fields_set

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, level: object) -> object:
        return level.lower() if isinstance(level, str) else level

    @model_validator(mode="after")
    def _check(self) -> GatewaySettings:
        if self.request_timeout > self.max_request_timeout:
            raise ValueError("request_timeout must not exceed max_request_timeout")
        if self.generation_timeout > self.max_generation_timeout:
            raise ValueError("generation_timeout must not exceed max_generation_timeout")
        for names in (("tokenizer", "shard"), ("generator_tokenizer", "generator_shard")):
            if bool(getattr(self, names[0])) != bool(getattr(self, names[1])):
                raise ValueError(f"{names[0]} and {names[1]} must both be set, or both be empty")
        if not self.shard and not self.generator_shard:
            raise ValueError("shard and generator_shard are both empty: there is no model to serve")
        if not self.cache_secret.get_secret_value():
            raise ValueError("cache_secret must not be empty; leave it unset for a random one")
        if self.https and self.tls_dir is None:
            raise ValueError("https needs a certificate: set MIAOTUI_TLS_DIR")
        return self


def split_listen(listen: str) -> tuple[str, int]:
    """`"host:port"` → `(host, port)`; IPv6 hosts in brackets. Raises `ValueError`."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"a listen address must be host:port, such as 127.0.0.1:8080: {listen}")
    return host.strip("[]") or "0.0.0.0", int(port)
