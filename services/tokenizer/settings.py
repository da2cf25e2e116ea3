"""Settings of the tokenizer service, from environment (`MIAOTUI_TOKENIZER_*`) and flags."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.rpc.settings import InnerSettings


class TokenizerSettings(InnerSettings):
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
    max_file_bytes: int = Field(
        32 * 1024 * 1024,
        ge=1,
        le=60 * 1024 * 1024,
        description="Largest file of sound, or picture",
    )
    max_sound_seconds: float = Field(4 * 3600.0, gt=0, description="Longest sound, in seconds")
    max_pixels: int = Field(40_000_000, ge=1, description="Pixels of the largest picture")
    media_threads: int = Field(
        0, ge=0, description="Threads for sound and pictures; 0: one a core, four at most"
    )
    max_files: int = Field(
        32, ge=1, description="Files of sound or pictures read at once; more are refused"
    )
    drain_seconds: float = Field(
        5.0, ge=0, description="Seconds that open requests get when the service stops"
    )
    metrics_port: int | None = Field(None, description="Port for Prometheus; none: no endpoint")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
