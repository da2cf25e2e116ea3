"""Settings of the tokenizer service, from environment (`MIAOTUI_TOKENIZER_*`) and flags."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.rpc.tls import TlsSettings


class TokenizerSettings(TlsSettings):
    """What it tokenises for, where it listens, and what one call may cost."""

    model_config = SettingsConfigDict(env_prefix="MIAOTUI_TOKENIZER_", extra="forbid")

    model: Path = Field(description="Hugging Face model directory with a fast tokenizer")
    listen: str = Field("127.0.0.1:50051", description="host:port to bind; port 0: any free one")
    max_characters: int = Field(
        1_000_000, ge=1, description="Longest question or passage, in characters"
    )
    max_window_tokens: int = Field(
        8_000_000, ge=1, description="Most tokens in all windows of a request together"
    )
    max_spans: int = Field(10_000, ge=1, description="Most spans, or ids, to decode in a request")
    worker_threads: int = Field(
        0, ge=0, description="Threads for long texts; 0: one a core, four at most"
    )
    max_waiting: int = Field(
        64, ge=1, description="Long texts that may wait for a thread; more are refused"
    )
    drain_seconds: float = Field(
        5.0, ge=0, description="Seconds that open requests get when the service stops"
    )
    metrics_port: int | None = Field(None, description="Port for Prometheus; none: no endpoint")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
