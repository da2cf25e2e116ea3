"""Settings of the gateway, from the environment (`MIAOTUI_GATEWAY_*`, `REDIS_URL`)."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from miaotui.retrieval.postgres.location import PostgresLocation, is_postgres
from services.rpc.settings import check_encryption_key
from services.rpc.tls import TlsSettings

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positive = Annotated[int, Field(gt=0)]


_ORIGIN = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


class GatewaySettings(TlsSettings):
    """Everything that an operator can set; each has an environment variable of its name."""

    model_config = SettingsConfigDict(
        env_prefix="MIAOTUI_GATEWAY_", extra="ignore", frozen=True, populate_by_name=True
    )

    http_listen: str = Field(default="127.0.0.1:8080", description="host:port of the HTTP API")
    grpc_listen: str = Field(default="127.0.0.1:50050", description="host:port of the gRPC API")
    tokenizer: str = Field(
        default="127.0.0.1:50051",
        description="host:port of the tokenizer service of the model that finds spans; of several "
        "replicas comma-separated, or a DNS name that leads to all of them; empty: none",
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

    transcriber_tokenizer: str = Field(
        default="",
        description="host:port of the tokenizer service of the model that writes down what is "
        "said; empty: none",
    )
    transcriber_shard: str = Field(
        default="", description="host:port of that model's stage 0; empty: none"
    )
    captioner_tokenizer: str = Field(
        default="",
        description="host:port of the tokenizer service of the model that describes pictures; "
        "empty: none",
    )
    captioner_shard: str = Field(
        default="", description="host:port of that model's stage 0; empty: none"
    )

    encoder_stages: str = Field(
        default="",
        description="host:port of stage 0 of the encoder that finds documents by their meaning; "
        "of several replicas comma-separated; empty: documents are found by their words only",
    )

    documents: SecretStr = Field(
        default=SecretStr(""),
        description="directory of the users' documents, or a PostgreSQL database as "
        "postgresql://user:password@host/database; empty: the user's data folder",
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

    upload_timeout: Seconds = Field(
        default=600.0, description="seconds within which an upload of documents must arrive"
    )
    max_header_bytes: Positive = Field(
        default=32 * 1024, description="path and headers of a request; more get 431"
    )
    header_timeout: Seconds = Field(
        default=10.0, description="seconds within which a request's headers must arrive"
    )
    max_body_bytes: Positive = Field(default=1024 * 1024, description="larger bodies get 413")
    max_sound_bytes: Positive = Field(
        default=32 * 1024 * 1024, description="largest upload of sound"
    )
    max_picture_bytes: Positive = Field(
        default=10 * 1024 * 1024, description="largest picture of a chat"
    )
    max_media_requests: Positive = Field(
        default=16, description="uploads of sound, or pictures, worked on at once"
    )
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
    kept_traces: int = Field(
        default=200, ge=0, description="traces of recent requests kept for /v1/traces; 0: none"
    )
    traces_per_second: Seconds = Field(
        default=1.0,
        description="requests a second that are traced, where OTEL_EXPORTER_OTLP_ENDPOINT names "
        "no collector; those with a sampled traceparent always are",
    )

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

    cache_encryption_key: SecretStr | None = Field(
        default=None,
        description="encrypts what is cached (AES-GCM); gateways that share a cache must share it; "
        "absent: cached values are sealed, but readable",
    )

    keys: Path | None = Field(
        default=None,
        description="file of API keys, made by `miaotui keys`; absent: nobody needs a key",
    )
    open_metrics: bool = Field(
        default=False,
        description="with keys: /metrics needs none; for scrapers in a closed network",
    )

    cors_origins: str = Field(
        default="",
        description="origins, separated by commas, whose pages may use this gateway, such as "
        "http://127.0.0.1:8080; its own page may talk to them, too; empty: none",
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

    @field_validator("documents")
    @classmethod
    def _check_documents(cls, documents: SecretStr) -> SecretStr:
        if is_postgres(documents.get_secret_value()):
            PostgresLocation.parse(documents.get_secret_value())
        return documents

    @property
    def longest_timeout(self) -> float:
        """Most seconds that a caller may set for a question, of whatever mode."""
        if self.generator_shard:
            return max(self.max_request_timeout, self.max_generation_timeout)
        return self.max_request_timeout

    @property
    def writes(self) -> bool:
        """Whether there is a model that writes text, of whatever kind."""
        return bool(self.generator_shard or self.transcriber_shard or self.captioner_shard)

    @property
    def max_chat_bytes(self) -> int:
        """Largest body of a chat: with a model that sees, it may hold a picture in base64."""
        return self.max_body_bytes + (
            self.max_picture_bytes * 3 // 2 if self.captioner_shard else 0
        )

    @property
    def documents_store(self) -> str:
        """Where the users' documents are kept: a folder, or a database's URL with its password."""
        if location := self.documents.get_secret_value():
            return location
        data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
        return str(Path(data) / "miaotui" / "documents")

    @property
    def shares_cache(self) -> bool:
        """Whether other gateways may use the same cache: a random secret is nobody else's."""
        return self.redis_url is not None and "cache_secret" in self.model_fields_set

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str) -> str:
        for origin in _split(origins):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin must be http[s]://host[:port] or *, not {origin}")
        return origins

    @property
    def cors_allowed(self) -> list[str]:
        """The origins of `cors_origins`."""
        return _split(self.cors_origins)

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
        for model in ("", "generator_", "transcriber_", "captioner_"):
            tokenizer, shard = f"{model}tokenizer", f"{model}shard"
            if bool(getattr(self, tokenizer)) != bool(getattr(self, shard)):
                raise ValueError(f"{tokenizer} and {shard} must both be set, or both be empty")
        if not self.shard and not self.writes:
            raise ValueError(
                "shard, generator_shard, transcriber_shard and captioner_shard are all empty: "
                "there is no model to serve"
            )
        if not self.cache_secret.get_secret_value():
            raise ValueError("cache_secret must not be empty; leave it unset for a random one")
        check_encryption_key("cache_encryption_key", self.cache_encryption_key)
        if self.https and self.tls_dir is None:
            raise ValueError("https needs a certificate: set MIAOTUI_TLS_DIR")
        return self


def split_listen(listen: str) -> tuple[str, int]:
    """`"host:port"` → `(host, port)`; IPv6 hosts in brackets. Raises `ValueError`."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"a listen address must be host:port, such as 127.0.0.1:8080: {listen}")
    return host.strip("[]") or "0.0.0.0", int(port)
