"""Real services for the cases: four models in two stages each, the encoder, and stages 1 that get
wrong frames."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from miaotui.v1 import explain_pb2, gateway_pb2, shard_pb2, tokenizer_pb2
from tests.checkpoints import make_checkpoint
from tests.decoder_checkpoints import make_decoder
from tests.encoder import EncoderStage, open_encoder
from tests.fuzz.cases import LATE, MARK, Entry, Finding
from tests.fuzz.frames import FrameCases
from tests.fuzz.http import HttpCases
from tests.fuzz.requests import good_requests
from tests.fuzz.rpc import RpcCases
from tests.media.checkpoints import make_captioner, make_whisper
from tests.processes import Cluster, ServiceProcess, free_port

_LIMITS = {
    "MIAOTUI_GATEWAY_REQUEST_TIMEOUT": "10",
    "MIAOTUI_GATEWAY_MAX_REQUEST_TIMEOUT": "10",
    "MIAOTUI_GATEWAY_GENERATION_TIMEOUT": "10",
    "MIAOTUI_GATEWAY_MAX_GENERATION_TIMEOUT": "10",
    "MIAOTUI_GATEWAY_BODY_TIMEOUT": "2",
    "MIAOTUI_GATEWAY_READING_TIMEOUT": "20",
}
_BLOCKS = {"MIAOTUI_SHARD_KV_CACHE_BYTES": "4000000"}
# What the gateway's settings call the models that are not the reader.
_PREFIXES = {"writer": "GENERATOR", "hearer": "TRANSCRIBER", "seer": "CAPTIONER"}
_QUESTION = {
    "question": "Who wrote the first program?",
    "context": "Ada Lovelace wrote the first program in 1843.",
    "no_cache": True,
}
# The log of a process that met something that nobody had thought of.
_TROUBLE = re.compile(
    r"Traceback|^\w*Error\b|Exception|core dumped|Segmentation|libmpg123|MPEG-Header", re.MULTILINE
)


def _services(file: Any) -> list[ServiceDescriptor]:
    return list(file.DESCRIPTOR.services_by_name.values())


def _share(name: str) -> float:
    """Common services are not ours; Forward needs its own cases; files are most of what a model
    that hears or sees is sent."""
    if name.endswith("/ExtractFeatures"):
        return 6.0
    if name.startswith(("Health", "ServerReflection", "ExplainService")):
        return 0.15
    if name.startswith(("ShardService/Forward", "ShardService/Describe")):
        return 0.4
    return 3.0


class Services:
    """The processes and their entry points."""

    def __init__(
        self,
        cluster: Cluster,
        others: Mapping[str, Cluster],
        encoder: EncoderStage | None,
        victims: list[ServiceProcess],
    ) -> None:
        """`others`: the models beside the reader, by what they do."""
        self._cluster = cluster
        self._victims = victims
        self._encoder = encoder
        self.processes = [*cluster.processes, *victims]
        if encoder is not None:
            self.processes.append(encoder)
        for other in others.values():
            self.processes += [other.tokenizer, *other.shards]
        self._others = others
        self._answer: Any = None
        self._closing: list[RpcCases | FrameCases] = []
        self._resident: dict[str, int] = {}

    @property
    def url(self) -> str:
        """The gateway's."""
        return self._cluster.url

    async def entries(self, victims: dict[str, tuple[str, str]]) -> list[Entry]:
        """All of them; `victims`: host:port of both stages of rings that are sent wrong frames."""
        cluster = self._cluster
        common = [*_services(health_pb2), *_services(reflection_pb2)]
        gateway = [*_services(gateway_pb2), *_services(trace_service_pb2), *common]
        shard = [*_services(shard_pb2), *_services(explain_pb2), *common]
        tokenizer = [*_services(tokenizer_pb2), *common]
        servers = {
            "gateway": (cluster.grpc_target, gateway),
            "tokenizer": (cluster.tokenizer_target, tokenizer),
            "stage 0": (cluster.stage_targets[0], shard),
            "stage 1": (cluster.stage_targets[1], shard),
        }
        for name, other in self._others.items():
            servers[f"{name}'s tokenizer"] = (other.tokenizer_target, _services(tokenizer_pb2))
            for index, target in enumerate(other.stage_targets):
                servers[f"{name}'s stage {index}"] = (target, _services(shard_pb2))
        if self._encoder is not None:
            servers["encoder's stage"] = (self._encoder.address, _services(shard_pb2))
        async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as http:
            document = (await http.get("/openapi.json")).json()
        port = int(cluster.url.rpartition(":")[2])
        made = HttpCases(port, document).entries()
        for name, (target, services) in servers.items():
            good = good_requests(name.partition("'")[0])
            cases = RpcCases(name, target, services, good, _share)
            made += cases.entries()
            self._closing.append(cases)
        for name, (own, target) in victims.items():
            frames = FrameCases(name, target, own)
            made += frames.entries()
            self._closing.append(frames)
        return made

    async def close(self) -> None:
        """Closes the channels."""
        for cases in self._closing:
            await cases.close()

    async def check_answer(self) -> None:
        """Asks a question whose answer is known. Raises `Finding`."""
        async with httpx.AsyncClient(
            base_url=self._cluster.url, trust_env=False, timeout=60
        ) as http:
            for _ in range(3):
                try:
                    response = await http.post("/v1/qa", json=_QUESTION)
                except httpx.TransportError as error:
                    raise Finding(f"a right question fails: {type(error).__name__}") from None
                if response.status_code != 504 and LATE not in response.text:
                    break  # or the machine is busy with other things
        if response.status_code != 200:
            raise Finding(f"a right question gets {response.status_code}: {response.text[:300]}")
        answers = [(a["text"], a["start"], a["end"]) for a in response.json()["answers"]]
        self._answer = self._answer or answers
        if answers != self._answer:
            raise Finding(f"a right question is answered by {answers}, not {self._answer}")

    def check_processes(self) -> list[str]:
        """What is wrong with the processes and their logs."""
        wrong = []
        for process in self.processes:
            if not process.alive:
                wrong.append(f"{process.name} died\n{process.tail()}")
            log = process.log
            if MARK in log.lower():
                line = next(line for line in log.splitlines() if MARK in line.lower())
                wrong.append(f"{process.name} logs what it was sent: {line[:300]}")
            if found := _TROUBLE.search(log):
                around = log[max(0, found.start() - 600) : found.end() + 2500]
                wrong.append(f"{process.name} logs trouble:\n{around}")
        return wrong

    def memory(self) -> dict[str, tuple[int, int]]:
        """Resident bytes of each process: at the first call of this, and now."""
        now = {p.name: psutil.Process(p.pid).memory_info().rss for p in self.processes if p.alive}
        self._resident = self._resident or now
        return {name: (self._resident.get(name, size), size) for name, size in now.items()}


def _victim(name: str, model: Path, directory: Path) -> tuple[ServiceProcess, tuple[str, str]]:
    """A stage 1 whose stage 0 never comes: the cases play it."""
    targets = (f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    env = {
        "MIAOTUI_SHARD_MODEL": str(model),
        "MIAOTUI_SHARD_STAGE": "1",
        "MIAOTUI_SHARD_STAGES": ",".join(targets),
        "MIAOTUI_SHARD_DTYPE": "float32",
        **_BLOCKS,
    }
    argv = [sys.executable, "-m", "services.shard"]
    return ServiceProcess(f"victim-{name}", argv, env, directory / f"{name}.log"), targets


def _companion(name: str, model: Path) -> Cluster:
    """A model beside the reader: without a gateway of its own."""
    cluster = Cluster(model, generative=True, shard_env=dict(_BLOCKS))
    for process in (cluster.tokenizer, *cluster.shards):
        process.name = f"{name}-{process.name}"
    return cluster


@asynccontextmanager
async def running_services(
    directory: Path, *, writes: bool
) -> AsyncIterator[tuple[Services, list[Entry]]]:
    """Starts everything; without `writes`, neither models that write, hear and see nor the
    encoder."""
    models = {"reader": make_checkpoint(directory / "reader", "bert", layers=2, hidden=32)}
    if writes:
        models["writer"] = make_decoder(directory / "writer", "llama", layers=2, max_length=128)
        models["hearer"] = make_whisper(directory / "hearer")
        models["seer"] = make_captioner(directory / "seer")
    others = {name: _companion(name, models[name]) for name in _PREFIXES if name in models}
    env = dict(_LIMITS)
    async with AsyncExitStack() as stack:
        for name, other in others.items():
            for process in (other.tokenizer, *other.shards):
                process.start()
                stack.push_async_callback(asyncio.to_thread, process.stop)
            env[f"MIAOTUI_GATEWAY_{_PREFIXES[name]}_TOKENIZER"] = other.tokenizer_target
            env[f"MIAOTUI_GATEWAY_{_PREFIXES[name]}_SHARD"] = other.stage_targets[0]
        encoder = None
        if writes:
            encoder = EncoderStage(directory)
            encoder.start()
            stack.push_async_callback(asyncio.to_thread, encoder.stop)
            env["MIAOTUI_GATEWAY_ENCODER_STAGES"] = encoder.address
        victims, targets = [], {}
        for name, model in models.items():
            process, target = _victim(name, model, directory)
            process.start()
            stack.push_async_callback(asyncio.to_thread, process.stop)
            victims.append(process)
            targets[name] = target
        cluster = await stack.enter_async_context(Cluster(models["reader"], gateway_env=env))
        if encoder is not None:
            # No gateway waits for it, but its own cases need it.
            pair, _ = await open_encoder(encoder.address)
            await pair.close()
        services = Services(cluster, others, encoder, victims)
        stack.push_async_callback(services.close)
        await services.check_answer()
        services.memory()
        yield services, await services.entries(targets)
