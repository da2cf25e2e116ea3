"""The real services as separate processes, for tests: start, wait, log, disturb, clean up."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil
from grpc import aio

from miaotui.v1 import shard_pb2, shard_pb2_grpc
from services.rpc.channel import open_channel
from tests.nursery import MODULES, Forked, Nursery

CHILD = Path(__file__).parent.parent / "miaotui" / "cli" / "child.py"
# Starting a shard imports torch and transformers, on cores that other tests use too.
START_SECONDS = 240.0
# A gateway may finish what runs for 10 s; leaving takes a process that holds torch a while, too.
STOP_SECONDS = 60.0
# How long a service may take for a word on a machine that does other things at the time.
ANSWER_SECONDS = 60.0
# What the environment of a developer might hold must not decide a test.
_SCRUBBED = ("MIAOTUI_", "OTEL_", "REDIS_URL")

# Every process that runs now; conftest.py adds their logs to a failed test's report.
running: list[ServiceProcess] = []


_nursery: Nursery | None = None
# Ports are taken before the services that listen on them start: none may be given twice.
_given: set[int] = set()


def _own_ports() -> range:
    """Below the range from which the kernel takes ports for clients; a pytest worker's alone."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    each = 12_000 // workers
    return range(20_000 + worker * each, 20_000 + (worker + 1) * each)


def free_port() -> int:
    """A free port that is given once."""
    ports = _own_ports()
    for _ in range(200):
        port = random.choice(ports)
        if port in _given:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            _given.add(port)
            return port
    raise AssertionError(f"no free port between {ports[0]} and {ports[-1]}")


def clean_environment() -> dict[str, str]:
    """This process's environment without what would configure Miaotui."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_SCRUBBED)}
    return {**kept, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _forks(module: list[str]) -> bool:
    return module in [[one] for one in MODULES] and os.environ.get("MIAOTUI_TEST_FORK") != "0"


def _the_nursery() -> Nursery:
    global _nursery
    if _nursery is None or not _nursery.alive:
        _nursery = Nursery(clean_environment())
    return _nursery


class ServiceProcess:
    """One process, whose output goes to a file. It dies with the test run, however that ends."""

    def __init__(self, name: str, argv: list[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.argv = argv
        self.env = dict(env)
        self.log_file = log
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._asked_to_stop = False

    def start(self) -> None:
        """Starts it; again, with a further log in the same file, where it has ended."""
        assert not self.alive, f"{self.name} runs already"
        self._asked_to_stop = False
        env = {**clean_environment(), **self.env}
        if self.argv[:2] == [sys.executable, "-m"] and _forks(self.argv[2:]):
            self._process = _the_nursery().start(self.argv[2], env, self.log_file)
        else:
            with self.log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", str(CHILD), str(os.getpid()), *self.argv],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        if self not in running:
            running.append(self)

    @property
    def process(self) -> subprocess.Popen[bytes] | Forked:
        """The process; fails where it was never started."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    def tail(self, lines: int = 40) -> str:
        """Its last lines, under its name."""
        state = "runs" if self.alive else f"ended with {self.process.returncode}"
        return "\n".join([f"--- {self.name} ({state})", *self.log.splitlines()[-lines:]])

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, such as SIGSTOP."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and waits until it is gone."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        """Waits for its end and returns the exit code."""
        return self.process.wait(timeout)

    def ask_to_stop(self) -> None:
        """SIGTERM, without waiting for the end."""
        if self.alive and not self._asked_to_stop:
            self._asked_to_stop = True
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # a stopped one would not hear it

    def stop(self) -> int:
        """SIGTERM; kills it and fails where it does not stop in time."""
        if self._process is None:
            return 0
        try:
            self.ask_to_stop()
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"did not stop within {STOP_SECONDS:.0f} s\n{self.tail()}"
            ) from None
        finally:
            if self in running:
                running.remove(self)


class RedisServer(ServiceProcess):
    """A real Redis on a free port."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("redis-server")
        assert program, "redis-server is missing: apt-get install redis-server (make test does)"
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)]
        super().__init__(
            "redis",
            [program, *arguments, "--save", "", "--appendonly", "no"],
            {},
            directory / "redis.log",
        )

    def start(self) -> None:
        """Starts it and waits until it accepts connections."""
        super().start()
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.alive, self.tail()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError(self.tail())


class Cluster:
    """A tokenizer service, N stages and a gateway over one model directory.

    `async with Cluster(model, stages=3) as cluster: …` returns when all serve, and stops all.
    """

    def __init__(
        self,
        model: Path,
        *,
        stages: int = 2,
        layers: str = "",
        dtype: str = "float32",
        redis_url: str | None = None,
        otlp: str | None = None,
        shard_env: Mapping[str, str] | None = None,
        stage_env: Mapping[int, Mapping[str, str]] | None = None,
        tokenizer_env: Mapping[str, str] | None = None,
        gateway_env: Mapping[str, str] | None = None,
        only_shards: bool = False,
        generative: bool = False,
    ) -> None:
        """`stage_env`: what only one stage gets. `otlp`: host:port of a trace collector.

        With `only_shards`, the shards alone are started, and nothing is waited for. With
        `generative`, the model is a decoder: the gateway writes text and reads no spans.
        """
        self.model = model
        self.stage_targets = [f"127.0.0.1:{free_port()}" for _ in range(stages)]
        self.tokenizer_target = f"127.0.0.1:{free_port()}"
        self.grpc_target = f"127.0.0.1:{free_port()}"
        http = f"127.0.0.1:{free_port()}"
        self.url = f"http://{http}"
        self._directory = Path(tempfile.mkdtemp(prefix="miaotui-cluster-"))
        traces = {} if otlp is None else _exporting_to(otlp)
        shard = {
            **traces,
            "MIAOTUI_SHARD_MODEL": str(model),
            "MIAOTUI_SHARD_STAGES": ",".join(self.stage_targets),
            "MIAOTUI_SHARD_LAYERS": layers,
            "MIAOTUI_SHARD_DTYPE": dtype,
            **(shard_env or {}),
        }
        self.tokenizer = self._service(
            "tokenizer",
            "services.tokenizer",
            {
                **traces,
                "MIAOTUI_TOKENIZER_MODEL": str(model),
                "MIAOTUI_TOKENIZER_LISTEN": self.tokenizer_target,
                **(tokenizer_env or {}),
            },
        )
        self.shards = [
            self._service(
                f"shard-{index}",
                "services.shard",
                {"MIAOTUI_SHARD_STAGE": str(index), **shard, **(stage_env or {}).get(index, {})},
            )
            for index in range(stages)
        ]
        self.gateway = self._service(
            "gateway",
            "gateway",
            {
                **traces,
                "MIAOTUI_GATEWAY_DOCUMENTS": str(self._directory / "documents"),
                "MIAOTUI_GATEWAY_HTTP_LISTEN": http,
                "MIAOTUI_GATEWAY_GRPC_LISTEN": self.grpc_target,
                "MIAOTUI_GATEWAY_TOKENIZER": "" if generative else self.tokenizer_target,
                "MIAOTUI_GATEWAY_SHARD": "" if generative else self.stage_targets[0],
                "MIAOTUI_GATEWAY_GENERATOR_TOKENIZER": self.tokenizer_target if generative else "",
                "MIAOTUI_GATEWAY_GENERATOR_SHARD": self.stage_targets[0] if generative else "",
                **({"REDIS_URL": redis_url} if redis_url else {}),
                **(gateway_env or {}),
            },
        )
        self.processes = [self.tokenizer, *self.shards, self.gateway]
        self._only_shards = only_shards
        if only_shards:
            self.processes = list(self.shards)

    def _service(self, name: str, module: str, env: Mapping[str, str]) -> ServiceProcess:
        argv = [sys.executable, "-m", module]
        return ServiceProcess(name, argv, env, self._directory / f"{name}.log")

    async def __aenter__(self) -> Self:
        self.start()
        try:
            if not self._only_shards:
                await self.ready()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(self.logs())
        await asyncio.to_thread(self.stop)

    def start(self) -> None:
        """Starts all processes without waiting."""
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        """Stops all, the gateway first; fails where one does not stop by itself."""
        failures = []
        for process in reversed(self.processes):
            if process is not self.gateway:
                # Together, because a process that holds torch takes a while to end.
                for other in self.processes:
                    other.ask_to_stop()
            try:
                process.stop()
            except AssertionError as error:
                failures.append(str(error))
        shutil.rmtree(self._directory, ignore_errors=True)
        assert not failures, "\n".join(failures)

    def logs(self, lines: int = 40) -> str:
        """The last lines of every process."""
        return "\n".join(process.tail(lines) for process in self.processes)

    def whole_logs(self) -> str:
        """Everything that any process has printed."""
        return "\n".join(process.log for process in self.processes)

    async def ready(self, timeout: float = START_SECONDS) -> None:
        """Waits until the gateway answers questions; fails at once where a process dies."""
        deadline = time.monotonic() + timeout
        state = "the gateway does not answer"
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < deadline:
                dead = [process.name for process in self.processes if not process.alive]
                assert not dead, f"died at start: {dead}\n{self.logs()}"
                try:
                    response = await client.get(f"{self.url}/readyz")
                    if response.status_code == 200:
                        return
                    state = response.text
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
        raise AssertionError(f"not ready within {timeout:.0f} s: {state}\n{self.logs()}")

    async def describe(self, stage: int) -> shard_pb2.ShardServiceDescribeResponse:
        """What a stage says of itself, as soon as it listens."""
        await self._listening(self.shards[stage], self.stage_targets[stage])
        async with open_channel(self.stage_targets[stage]) as channel:
            stub = shard_pb2_grpc.ShardServiceStub(channel)
            request = shard_pb2.ShardServiceDescribeRequest()
            response: shard_pb2.ShardServiceDescribeResponse = await stub.Describe(
                request, timeout=ANSWER_SECONDS
            )
            return response

    async def _listening(self, process: ServiceProcess, target: str) -> None:
        host, _, port = target.rpartition(":")
        deadline = time.monotonic() + START_SECONDS
        while True:
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    return
            assert process.alive, process.tail()
            assert time.monotonic() < deadline, f"does not listen on {target}\n{process.tail()}"
            await asyncio.sleep(0.05)

    async def health(self, target: str) -> int:
        """The health that a service reports (`HealthCheckResponse.ServingStatus`)."""
        from grpc_health.v1 import health_pb2

        async with open_channel(target) as channel:
            check: aio.UnaryUnaryMultiCallable[
                health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
            ] = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            response = await check(health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS)
            return response.status

    async def idle(self, timeout: float = ANSWER_SECONDS) -> None:
        """Waits until no stage holds work; fails where one does not let go of it."""
        deadline = time.monotonic() + timeout
        held: list[tuple[int, int]] = []
        while time.monotonic() < deadline:
            stages = [await self.describe(index) for index in range(len(self.shards))]
            held = [(stage.queued_sequences, stage.running_sequences) for stage in stages]
            if not any(map(sum, held)):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"work is left, (queued, running) per stage: {held}\n{self.logs()}")


def _exporting_to(otlp: str) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{otlp}",
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }


def processes_with(mark: str) -> list[psutil.Process]:
    """The processes whose environment has a variable of this value."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
