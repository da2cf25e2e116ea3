"""Settings of a shard service, from environment (`MIAOTUI_SHARD_*`) and flags."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.rpc.endpoints import split_addresses
from services.rpc.settings import InnerSettings, check_encryption_key


def split_replicas(text: str) -> tuple[tuple[str, ...], ...]:
    """`"a:1|b:1, c:1"` → `(("a:1", "b:1"), ("c:1",))`: of each stage, its replicas."""
    return tuple(split_addresses(stage.replace("|", ",")) for stage in split_addresses(text))


class ShardSettings(InnerSettings):
    """One stage of a pipeline. `stages` is the same for all of them, `stage` is its own."""

    model_config = SettingsConfigDict(env_prefix="MIAOTUI_SHARD_", extra="forbid")

    model: Path = Field(description="Hugging Face model directory (safetensors)")
    task: Literal["auto", "embed"] = Field(
        "auto",
        description="embed: serve an encoder's vectors of texts (the mean over their tokens); "
        "auto: find answers or write, as the model was trained to",
    )
    stage: int = Field(0, ge=0, description="Index of this stage, from 0")
    stages: str = Field(
        "127.0.0.1:50060",
        description="host:port of every stage in order, comma-separated; replicas of a stage "
        "separated by |, or one DNS name that leads to all of them",
    )
    replica: int = Field(
        0, ge=0, description="Which of the replicas listed for its stage this is, from 0"
    )
    advertise: str = Field(
        "",
        description="host:port under which other stages reach this one; {hostname} in it stands "
        "for this machine's name; empty: its entry of `stages`",
    )
    listen: str = Field("", description="host:port to bind; empty: this stage's entry of `stages`")
    layers: str = Field(
        "", description='Layer ranges of all stages, such as "0-3,3-6"; empty: planned by cost'
    )
    dtype: Literal["auto", "fast", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of the computation; auto: bfloat16 on GPUs, float32 on CPUs; fast: bfloat16 "
        "on CPUs too, where a trial finds it faster",
    )
    wire_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="Of activations between stages; auto: as computed; int8: a byte each and a "
        "scale a token, half of bfloat16's bytes, rounded",
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
    news_seconds: float = Field(
        0.03,
        ge=0,
        le=1,
        description="Decoders: new tokens are sent at most this often, but for a text's first and "
        "last; 0: every step",
    )
    prefix_cache: bool = Field(
        True, description="Decoders: whether prompts that begin alike share keys and values"
    )
    kv_shares: int = Field(
        0,
        ge=0,
        le=256,
        description="Decoders: lanes (ways from a replica of stage 0 through one replica of each "
        "stage) among which this replica divides its KV cache; 0: as many as `stages` needs",
    )
    stall_seconds: float = Field(
        30.0,
        gt=0,
        description="Seconds without a result after which stage 0 gives its work to another lane",
    )
    passage_cache_bytes: int = Field(
        256 * 1024 * 1024,
        ge=0,
        description="Stage 0 of a model that reads passages apart: for what it has computed of "
        "them; 0: nothing is kept",
    )
    # Not REDIS_URL, which is the gateways': a passage takes a thousand times an answer's bytes, and
    # would drive their answers out of a Redis that was made for these.
    passage_redis_url: SecretStr | None = Field(
        None,
        description="Stage 0 of a model that reads passages apart: Redis to keep what it has "
        "computed of them in, besides its memory, for restarts and its replicas; absent: none",
    )
    passage_redis_secret: SecretStr | None = Field(
        None,
        description="Keys the hashes and seals what is kept there; the same for all replicas",
    )
    passage_redis_encryption_key: SecretStr | None = Field(
        None,
        description="Encrypts what is kept there (AES-GCM), which tells about the passages; the "
        "same for all replicas; absent: it is sealed, but readable",
    )
    passage_redis_ttl_seconds: int = Field(
        3600, gt=0, description="How long passages are kept there"
    )
    passage_redis_entry_bytes: int = Field(
        4 * 1024 * 1024, gt=0, description="Passages that take more are not kept there"
    )
    passage_redis_timeout: float = Field(
        0.05,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for one operation there; a batch waits for two of these at most",
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
        10.0, ge=0, description="Seconds that a stopping stage gives its open requests"
    )
    metrics_port: int | None = Field(None, description="Port for Prometheus; none: no endpoint")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")

    @property
    def replicas(self) -> tuple[tuple[str, ...], ...]:
        """host:port of every stage's replicas, in order."""
        return split_replicas(self.stages)

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of every stage's first replica, in order."""
        return tuple(replicas[0] for replicas in self.replicas)

    @property
    def address(self) -> str:
        """This replica's own host:port, for the other stages."""
        own = self.replicas[self.stage]
        if self.advertise:
            return self.advertise.replace("{hostname}", socket.gethostname())
        return own[min(self.replica, len(own) - 1)]

    @property
    def shares(self) -> int:
        """Lanes among which this replica divides its KV cache."""
        if self.kv_shares:
            return self.kv_shares
        heads, *later = (len(replicas) for replicas in self.replicas)
        # Each stage 0 has so many lanes that all replicas of the others are on one.
        lanes = max(later, default=1)
        return lanes if self.stage == 0 else heads * -(-lanes // later[self.stage - 1])

    @property
    def colocated(self) -> int:
        """Stages that share this machine."""
        if self.colocated_stages:
            return self.colocated_stages
        hosts = [one.rpartition(":")[0] for replicas in self.replicas for one in replicas]
        return max(1, hosts.count(self.address.rpartition(":")[0]))

    @property
    def machines(self) -> int:
        """Machines that the stages of a lane run on."""
        if self.colocated_stages:
            return -(-len(self.addresses) // self.colocated_stages)
        return len({address.rpartition(":")[0] for address in self.addresses})

    @model_validator(mode="after")
    def _passages_are_sealed(self) -> ShardSettings:
        if self.passage_redis_url is None:
            return self
        secret = self.passage_redis_secret
        if secret is None or not secret.get_secret_value():
            raise ValueError("passage_redis_url needs passage_redis_secret, to seal what is kept")
        key = self.passage_redis_encryption_key
        check_encryption_key("passage_redis_encryption_key", key)
        return self

    @model_validator(mode="after")
    def _stage_is_listed(self) -> ShardSettings:
        if self.stage >= len(self.replicas):
            raise ValueError(
                f"stage {self.stage} is not in `stages`, which lists {len(self.replicas)} "
                "(count from 0)"
            )
        own = self.replicas[self.stage]
        if not self.advertise and self.replica >= len(own):
            raise ValueError(
                f"replica {self.replica} of stage {self.stage} is not in `stages`, which lists "
                f"{len(own)} (count from 0); list it, or say with `advertise` where it is"
            )
        listed = [one for replicas in self.replicas for one in replicas]
        if len(set(listed)) != len(listed):
            raise ValueError("`stages` lists an address twice")
        return self
