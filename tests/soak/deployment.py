"""All services of some models on hosts of their own, joined by links that can be disturbed."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import httpx
from grpc import aio

from miaotui.v1 import shard_pb2, shard_pb2_grpc
from services.rpc.certificates import make_certificates
from services.rpc.channel import CHANNEL_OPTIONS
from services.rpc.tls import CA, CERTIFICATE, KEY
from tests.namespaces import Hosts, Link
from tests.processes import ServiceProcess

STAGES = 2
ENCODER = "encoder"
"""The only stage of the model that finds documents by their meaning."""
# All services of several models start at once, perhaps on a machine that has other work.
READY_SECONDS = 300.0
HTTP, RPC, QA_TOKENIZER, GEN_TOKENIZER, SHARD, REDIS = 8080, 50050, 50051, 50052, 50060, 6379


@dataclass(frozen=True)
class Models:
    """Directories of the model that finds spans, and of others, where they are there."""

    qa: Path
    gen: Path | None = None
    """It writes."""
    encoder: Path | None = None
    """It finds documents by their meaning."""


def stage_names(kind: str, replicas: int) -> list[list[str]]:
    """The names of each stage's replicas: `qa-0`, `qa-1`, or `qa-0a`, `qa-0b`, …"""
    letters = [""] if replicas == 1 else [chr(ord("a") + index) for index in range(replicas)]
    return [[f"{kind}-{stage}{letter}" for letter in letters] for stage in range(STAGES)]


def host_names(models: Models, replicas: int) -> list[str]:
    """All hosts: each replica of a stage has one; both tokenizers share one."""
    kinds = ["qa"] if models.gen is None else ["qa", "gen"]
    stages = [name for kind in kinds for stage in stage_names(kind, replicas) for name in stage]
    encoders = [] if models.encoder is None else [ENCODER]
    return ["gateway", "tokenizer", "redis", *stages, *encoders]


class Deployment:
    """`async with Deployment(hosts, models, directory) as deployment: …`, ready and stopped.

    The encoder is not started: nothing waits for it, and it can be seen how all goes without.
    """

    def __init__(
        self, hosts: Hosts, models: Models, directory: Path, *, tls: bool, replicas: int = 1
    ) -> None:
        """`directory`: for logs, certificates and documents. `tls`: mutual, between services.

        `hosts`: as many as there are `host_names`. `replicas`: of each stage.
        """
        self._hosts = hosts
        self._models = models
        self._replicas = replicas
        self._names = host_names(models, replicas)
        assert hosts.count == len(self._names)
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._tls = directory / "tls" if tls else None
        if self._tls is not None:
            addresses = [
                of(host) for of in (hosts.address, hosts.outside) for host in range(hosts.count)
            ]
            make_certificates(self._tls, tuple(addresses))
        self.url = f"http://{hosts.outside(0)}:{HTTP}"
        self.services = {service.name: service for service in self._make()}

    # -- what runs where ------------------------------------------------------------------

    @property
    def links(self) -> list[tuple[str, str]]:
        """The links that anything passes, by their ends."""
        found = [("gateway", "tokenizer"), ("gateway", "redis")]
        if self._models.encoder is not None:
            found.append(("gateway", ENCODER))
        for kind in ("qa",) if self._models.gen is None else ("qa", "gen"):
            first, *later = stage_names(kind, self._replicas)
            found += [("gateway", name) for name in first]
            found += [(name, other) for name in first for stage in later for other in stage]
        return found

    @property
    def stages(self) -> list[str]:
        """The services that hold layers."""
        return [name for name in self._names if name.startswith(("qa-", "gen-", ENCODER))]

    def at(self, host: str, port: int) -> str:
        """host:port for the other hosts."""
        return f"{self._hosts.address(self._names.index(host))}:{port}"

    def link(self, ends: tuple[str, str]) -> Link:
        """The link between two hosts."""
        return self._hosts.link(*(self._names.index(end) for end in ends))

    def _make(self) -> list[ServiceProcess]:
        redis = shutil.which("redis-server")
        assert redis, "redis-server is missing: apt-get install redis-server (make test does)"
        python = [sys.executable, "-m"]
        gateway = {
            "MIAOTUI_GATEWAY_HTTP_LISTEN": f"0.0.0.0:{HTTP}",
            "MIAOTUI_GATEWAY_GRPC_LISTEN": f"0.0.0.0:{RPC}",
            "MIAOTUI_GATEWAY_TOKENIZER": self.at("tokenizer", QA_TOKENIZER),
            "MIAOTUI_GATEWAY_SHARD": self._heads("qa"),
            "MIAOTUI_GATEWAY_DOCUMENTS": str(self._directory / "documents"),
            # A gateway that is started again finds what it had cached.
            "MIAOTUI_GATEWAY_CACHE_SECRET": "soak",
            "REDIS_URL": f"redis://{self.at('redis', REDIS)}/0",
        }
        models = [("qa", self._models.qa, QA_TOKENIZER)]
        if self._models.gen is not None:
            models.append(("gen", self._models.gen, GEN_TOKENIZER))
            gateway |= {
                "MIAOTUI_GATEWAY_GENERATOR_TOKENIZER": self.at("tokenizer", GEN_TOKENIZER),
                "MIAOTUI_GATEWAY_GENERATOR_SHARD": self._heads("gen"),
            }
        if self._models.encoder is not None:
            gateway["MIAOTUI_GATEWAY_ENCODER_STAGES"] = self.at(ENCODER, SHARD)
        # Without protection: only hosts of this run reach it.
        options = f"--port {REDIS} --bind 0.0.0.0 --protected-mode no --appendonly no --save"
        return [
            self._service("redis", "redis", [redis, *options.split(), ""], {}),
            *(
                self._service(
                    f"{kind}-tokenizer",
                    "tokenizer",
                    [*python, "services.tokenizer"],
                    {
                        "MIAOTUI_TOKENIZER_MODEL": str(model),
                        "MIAOTUI_TOKENIZER_LISTEN": f"0.0.0.0:{port}",
                    },
                )
                for kind, model, port in models
            ),
            *(stage for kind, model, _ in models for stage in self._stages(kind, model)),
            *self._encoders(),
            self._service("gateway", "gateway", [*python, "gateway"], gateway),
        ]

    def _heads(self, kind: str) -> str:
        first, *_ = stage_names(kind, self._replicas)
        return ",".join(self.at(name, SHARD) for name in first)

    def _stages(self, kind: str, model: Path) -> list[ServiceProcess]:
        names = stage_names(kind, self._replicas)
        addresses = ",".join("|".join(self.at(name, SHARD) for name in stage) for stage in names)
        count = sum(map(len, names))
        return [
            self._service(
                name,
                name,
                [sys.executable, "-m", "services.shard"],
                {
                    "MIAOTUI_SHARD_MODEL": str(model),
                    "MIAOTUI_SHARD_STAGE": str(stage),
                    "MIAOTUI_SHARD_STAGES": addresses,
                    "MIAOTUI_SHARD_REPLICA": str(replica),
                    "MIAOTUI_SHARD_LISTEN": f"0.0.0.0:{SHARD}",
                    "MIAOTUI_SHARD_DTYPE": "float32",
                    # The hosts share this machine's cores, whatever their addresses say.
                    "MIAOTUI_SHARD_COLOCATED_STAGES": str(count),
                },
            )
            for stage, replicas in enumerate(names)
            for replica, name in enumerate(replicas)
        ]

    def _encoders(self) -> list[ServiceProcess]:
        if self._models.encoder is None:
            return []
        env = {
            "MIAOTUI_SHARD_TASK": "embed",
            "MIAOTUI_SHARD_MODEL": str(self._models.encoder),
            "MIAOTUI_SHARD_STAGES": self.at(ENCODER, SHARD),
            "MIAOTUI_SHARD_LISTEN": f"0.0.0.0:{SHARD}",
            "MIAOTUI_SHARD_DTYPE": "float32",
            # Small, and beside those that answer.
            "MIAOTUI_SHARD_COLOCATED_STAGES": str(STAGES + 1),
        }
        return [self._service(ENCODER, ENCODER, [sys.executable, "-m", "services.shard"], env)]

    def _service(
        self, name: str, host: str, argv: list[str], env: Mapping[str, str]
    ) -> ServiceProcess:
        command = self._hosts.command(self._names.index(host), argv)
        tls = {} if self._tls is None else {"MIAOTUI_TLS_DIR": str(self._tls)}
        return ServiceProcess(name, command, {**tls, **env}, self._directory / f"{name}.log")

    # -- clients --------------------------------------------------------------------------

    def channel(self, host: str, port: int) -> aio.Channel:
        """A channel from this process, with the services' certificate where they want one."""
        target = f"{self._hosts.outside(self._names.index(host))}:{port}"
        if self._tls is None:
            return aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        files = [(self._tls / name).read_bytes() for name in (CA, KEY, CERTIFICATE)]
        credentials = grpc.ssl_channel_credentials(*files)
        return aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS)

    async def describe(self, stage: str) -> shard_pb2.ShardServiceDescribeResponse:
        """What a stage says of itself. Raises `AioRpcError`."""
        async with self.channel(stage, SHARD) as channel:
            stub = shard_pb2_grpc.ShardServiceStub(channel)
            request = shard_pb2.ShardServiceDescribeRequest()
            told: shard_pb2.ShardServiceDescribeResponse = await stub.Describe(request, timeout=10)
            return told

    # -- life -----------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            awaited = [process for process in self.services.values() if process.name != ENCODER]
            for process in awaited:
                process.start()
            await self._ready(awaited)
        except BaseException:
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """Ends all, kindly at first."""
        started = [process for process in self.services.values() if process.alive]
        for process in reversed(started):
            process.ask_to_stop()
        for process in started:
            try:
                process.stop()
            except AssertionError as error:
                print(f"{process.name}: {error}", file=sys.stderr)

    async def _ready(self, awaited: Sequence[ServiceProcess]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        state = "the gateway does not answer"
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < deadline:
                for process in awaited:
                    assert process.alive, f"died at its start\n{process.tail()}"
                try:
                    response = await client.get(f"{self.url}/readyz")
                    if response.status_code == 200:
                        return
                    state = response.text
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
        logs = "\n".join(process.tail(20) for process in awaited)
        raise AssertionError(f"not ready within {READY_SECONDS:.0f} s: {state}\n{logs}")
