"""Settings of a shard service, from environment (`MIAOTUI_SHARD_*`) and flags."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.rpc.tls import TlsSettings


def split_addresses(text: str) -> tuple[str, ...]:
    """`"a:1, b:2"` → `("a:1", "b:2")`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class ShardSettings(TlsSettings):
    """One stage of a pipeline. `stages` is the same for all of them, `stage` is its own."""

    model_config = SettingsConfigDict(env_prefix="MIAOTUI_SHARD_", extra="forbid")

    model: Path = Field(description="Hugging Face model directory (safetensors)")
    stage: int = Field(0, ge=0, description="Index of this stage, from 0")
    stages: str = Field(
        "127.0.0.1:50060", description="host:port of every stage in order, comma-separated"
    )
    listen: str = Field("", description="host:port to bind; empty: this stage's entry of `stages`")
    layers: str = Field(
        "", description='Layer ranges of all stages, such as "0-3,3-6"; empty: planned by cost'
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the computation; auto: bfloat16 where the hardware does it"
    )
    wire_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of activations between stages; auto: as computed"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    colocated_stages: int = Field(
        0, ge=0, description="Stages that share this machine's cores; 0: counted from `stages`"
    )
    batch_tokens: int = Field(
        0, ge=0, description="Most tokens in a batch; 0: 1,024 on CPU and 16,384 on CUDA"
    )
    min_batch_tokens: int = Field(
        256, ge=1, description="Batches are not cut smaller than this to feed more stages"
    )
    queue_sequences: int = Field(
        2048, ge=1, description="Most sequences in stage 0's queue; more are refused"
    )
    queue_tokens: int = Field(262_144, ge=1, description="Most tokens in stage 0's queue")
    max_request_sequences: int = Field(512, ge=1, description="Most sequences in one request")
    max_in_flight: int = Field(
        0, ge=0, description="Batches in the pipeline at once; 0: stages + 1"
    )
    kv_cache_bytes: int = Field(
        0,
        ge=0,
        description="Decoders: for this stage's keys and values; 0: its share of a quarter of "
        "the machine's free memory, or most of what is free on its GPU",
    )
    kv_block_tokens: int = Field(
        16, ge=1, le=1024, description="Decoders: tokens in a KV block; the same everywhere"
    )
    chunk_tokens: int = Field(
        0,
        ge=0,
        description="Decoders: most tokens of prompts in a batch while texts are being written; "
        "0: a quarter of the batch",
    )
    max_running: int = Field(
        256, ge=1, description="Decoders: most texts that are written at once; more wait"
    )
    micro_batches: int = Field(
        0,
        ge=0,
        description="Decoders: batches that the texts being written are spread over; 0: one a "
        "machine, as stages that share cores gain nothing from more",
    )
    draft_tokens: int = Field(
        8,
        ge=0,
        le=64,
        description="Decoders: most tokens guessed ahead from the prompt a step, where a request "
        "does not say; 0: none",
    )
    prefix_cache: bool = Field(
        True, description="Decoders: whether prompts that begin alike share keys and values"
    )
    inbox_batches: int = Field(4, ge=1, description="Batches that may wait at a later stage")
    part_bytes: int = Field(
        16 * 1024 * 1024,
        ge=1024,
        le=48 * 1024 * 1024,
        description="Tensors above this size travel in parts",
    )
    reconnect_grace: float = Field(
        30.0, ge=0, description="Seconds that requests wait for a broken pipeline to come back"
    )
    drain_seconds: float = Field(
        10.0, ge=0, description="Seconds that a stopping stage 0 gives its open requests"
    )
    metrics_port: int | None = Field(None, description="Port for Prometheus; none: no endpoint")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every stage's host:port, in order."""
        return split_addresses(self.stages)

    @property
    def address(self) -> str:
        """This stage's own host:port."""
        return self.addresses[self.stage]

    @property
    def colocated(self) -> int:
        """Stages that share this machine."""
        if self.colocated_stages:
            return self.colocated_stages
        hosts = [address.rpartition(":")[0] for address in self.addresses]
        return hosts.count(hosts[self.stage])

    @property
    def machines(self) -> int:
        """Machines that the stages run on."""
        if self.colocated_stages:
            return -(-len(self.addresses) // self.colocated_stages)
        return len({address.rpartition(":")[0] for address in self.addresses})

    @model_validator(mode="after")
    def _stage_is_listed(self) -> ShardSettings:
        if self.stage >= len(self.addresses):
            raise ValueError(
                f"stage {self.stage} is not in `stages`, which lists {len(self.addresses)} "
                "(count from 0)"
            )
        if len(set(self.addresses)) != len(self.addresses):
            raise ValueError("`stages` lists an address twice")
        return self
