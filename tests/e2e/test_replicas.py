"""Replicas of every stage: work spreads over them; none is lost when one dies, hangs or stops."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from miaotui.v1 import gateway_pb2, gateway_pb2_grpc, shard_pb2_grpc
from miaotui.v1 import shard_pb2 as pb
from services.rpc.channel import open_channel
from tests.checkpoints import make_checkpoint
from tests.decoder_checkpoints import make_decoder
from tests.e2e.asking import ask_grpc, ask_http, gathered, http_client, questions
from tests.e2e.generating import Prompt, prompts
from tests.e2e.generating import Reference as Texts
from tests.e2e.reference import Reference
from tests.processes import ANSWER_SECONDS, START_SECONDS, ServiceProcess, free_port

COUNTS = (2, 2)


class Model:
    """A model's tokenizer and stages, two replicas each."""

    def __init__(self, name: str, model: Path, directory: Path) -> None:
        self.model = model
        self.tokenizers = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        self.stages = [[f"127.0.0.1:{free_port()}" for _ in range(n)] for n in COUNTS]
        self._name, self._directory = name, directory
        self.tokenizing = [self._tokenizer(number) for number in range(2)]
        self.shards = [
            [self.shard(model, index, number) for number in range(count)]
            for index, count in enumerate(COUNTS)
        ]

    def _tokenizer(self, number: int) -> ServiceProcess:
        env = {
            "MIAOTUI_TOKENIZER_MODEL": str(self.model),
            "MIAOTUI_TOKENIZER_LISTEN": self.tokenizers[number],
        }
        return self._service(f"tokenizer-{number}", "services.tokenizer", env)

    def shard(self, model: Path, index: int, number: int) -> ServiceProcess:
        """A replica of a stage."""
        env = {
            "MIAOTUI_SHARD_MODEL": str(model),
            "MIAOTUI_SHARD_STAGE": str(index),
            "MIAOTUI_SHARD_STAGES": ",".join("|".join(replicas) for replicas in self.stages),
            "MIAOTUI_SHARD_REPLICA": str(number),
            "MIAOTUI_SHARD_DTYPE": "float32",
            "MIAOTUI_SHARD_KV_CACHE_BYTES": str(1 << 20),
        }
        return self._service(f"shard-{index}-{number}", "services.shard", env)

    def _service(self, name: str, module: str, env: dict[str, str]) -> ServiceProcess:
        name = f"{self._name}-{name}"
        argv = [sys.executable, "-m", module]
        return ServiceProcess(name, argv, env, self._directory / f"{name}.log")

    @property
    def processes(self) -> list[ServiceProcess]:
        """All of them."""
        return [*self.tokenizing, *(shard for replicas in self.shards for shard in replicas)]


class Replicated:
    """Both kinds of model behind one gateway."""

    def __init__(self, directory: Path) -> None:
        self.qa = Model("qa", make_checkpoint(directory / "qa", "bert", layers=2), directory)
        self.gen = Model("gen", make_decoder(directory / "gen", "llama", layers=2), directory)
        http = f"127.0.0.1:{free_port()}"
        self.url = f"http://{http}"
        self.grpc = f"127.0.0.1:{free_port()}"
        env = {
            "MIAOTUI_GATEWAY_HTTP_LISTEN": http,
            "MIAOTUI_GATEWAY_GRPC_LISTEN": self.grpc,
            "MIAOTUI_GATEWAY_TOKENIZER": ",".join(self.qa.tokenizers),
            "MIAOTUI_GATEWAY_SHARD": ",".join(self.qa.stages[0]),
            "MIAOTUI_GATEWAY_GENERATOR_TOKENIZER": ",".join(self.gen.tokenizers),
            "MIAOTUI_GATEWAY_GENERATOR_SHARD": ",".join(self.gen.stages[0]),
            "MIAOTUI_GATEWAY_DOCUMENTS": str(directory / "documents"),
            "MIAOTUI_GATEWAY_REQUEST_TIMEOUT": "60",
        }
        argv = [sys.executable, "-m", "gateway"]
        self.gateway = ServiceProcess("gateway", argv, env, directory / "gateway.log")
        self.processes = [*self.qa.processes, *self.gen.processes, self.gateway]
        self.questions = Reference(self.qa.model, max_length=384, stride=128)
        self.texts = Texts(self.gen.model)

    async def pipelines(self) -> list[dict[str, Any]]:
        """What /v1/pipeline says, of the extractive model and of the generative one."""
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            body = (await client.get(f"{self.url}/v1/pipeline")).json()
        return [body, *body["others"]]

    async def until(self, what: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Waits until /v1/pipeline says so."""
        deadline = time.monotonic() + 180
        said: object = None
        while time.monotonic() < deadline:
            try:
                said = await self.pipelines()
                if what(said):
                    return
            except (httpx.HTTPError, LookupError, ValueError):
                pass
            await asyncio.sleep(0.2)
        raise AssertionError(f"not within 180 s: {said}")

    async def ask(self, count: int, seed: int, disturb: Callable[[], Awaitable[None]]) -> None:
        """Asks questions, disturbs meanwhile, and checks every answer."""
        asked = questions(count, seed=seed, long_every=50)
        async with http_client(self.url) as client:
            load = asyncio.create_task(gathered(lambda q: ask_http(client, q), asked, 8))
            await asyncio.sleep(0.3)
            await disturb()
            for question, body in zip(asked, await load, strict=True):
                expected = self.questions.answer(question.question, question.context)
                expected.check(body, question.top_k)

    async def write(
        self, asked: list[Prompt], disturb: Callable[[], Awaitable[None]], **sampling: Any
    ) -> list[str]:
        """Texts, streamed over the gateway; disturbs once each has begun."""
        begun = [asyncio.Event() for _ in asked]
        async with httpx.AsyncClient(trust_env=False, timeout=180, base_url=self.url) as client:

            async def one(prompt: Prompt, first: asyncio.Event) -> str:
                body = {
                    "model": "gen",
                    "prompt": list(prompt.ids),
                    "max_tokens": prompt.max_tokens,
                    "stream": True,
                    "ignore_eos": True,
                    "no_cache": True,
                    **sampling,
                }
                text, reason = "", None
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200, await response.aread()
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        chunk = json.loads(line.removeprefix("data: "))
                        assert "error" not in chunk, chunk
                        for choice in chunk["choices"]:
                            text += choice["text"]
                            reason = choice["finish_reason"] or reason
                        first.set()
                assert reason == "length", reason
                return text

            load = [
                asyncio.create_task(one(p, first)) for p, first in zip(asked, begun, strict=True)
            ]
            await asyncio.wait_for(asyncio.gather(*(first.wait() for first in begun)), 120)
            await disturb()
            return list(await asyncio.gather(*load))


async def _nothing() -> None:
    """Disturbs nobody."""


def _serving(pipeline: dict[str, Any], stage: int) -> list[str]:
    replicas = pipeline["stages"][stage]["replicas"]
    return [one["address"] for one in replicas if one["state"] == "serving"]


def _whole(pipelines: list[dict[str, Any]]) -> bool:
    return all(len(_serving(one, stage)) == 2 for one in pipelines for stage in (0, 1))


@pytest.fixture(scope="module")
async def replicated(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Replicated]:
    made = Replicated(tmp_path_factory.mktemp("replicas"))
    try:
        for process in made.processes:
            process.start()
        await made.until(_whole)
        yield made
    finally:
        for process in made.processes:
            if process.alive:
                process.kill()


def _start_again(victims: Iterable[ServiceProcess]) -> None:
    """Whatever came of a test: the next ones find all replicas."""
    for victim in victims:
        if not victim.alive:
            victim.start()


async def _batches(target: str) -> int:
    async with open_channel(target) as channel:
        stub = shard_pb2_grpc.ShardServiceStub(channel)
        # The gateway may still have the word of the one that was killed here.
        told = await stub.Describe(
            pb.ShardServiceDescribeRequest(), timeout=START_SECONDS, wait_for_ready=True
        )
        while told.status != pb.STAGE_STATUS_SERVING:
            await asyncio.sleep(0.1)
            told = await stub.Describe(pb.ShardServiceDescribeRequest(), timeout=ANSWER_SECONDS)
        return int(told.batches_total)


async def test_work_spreads_over_replicas(replicated: Replicated) -> None:
    targets = [one for replicas in replicated.qa.stages for one in replicas]
    before = [await _batches(target) for target in targets]
    await replicated.ask(40, 1, _nothing)
    after = [await _batches(target) for target in targets]
    assert all(b > a for a, b in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("stage", [0, 1])
async def test_a_killed_replica_loses_no_question_and_gets_work_again(
    stage: int, replicated: Replicated
) -> None:
    victim = replicated.qa.shards[stage][0]

    async def kill() -> None:
        victim.kill()

    try:
        await replicated.ask(60, 10 + stage, kill)
    finally:
        _start_again([victim])
    await _batches(replicated.qa.stages[stage][0])
    await replicated.until(_whole)
    before = await _batches(replicated.qa.stages[stage][0])
    for turn in range(5):  # where few are under way at once, all may go to the other
        await replicated.ask(40, 20 + stage + 100 * turn, _nothing)
        if await _batches(replicated.qa.stages[stage][0]) > before:
            return
    raise AssertionError("the replica that came back gets no work")


async def test_a_hung_replica_loses_no_question(replicated: Replicated) -> None:
    victims = [replicated.qa.shards[1][1], replicated.qa.tokenizing[0]]

    async def hang() -> None:
        for victim in victims:
            victim.signal(signal.SIGSTOP)

    try:
        await replicated.ask(60, 30, hang)
    finally:
        for victim in victims:
            victim.signal(signal.SIGCONT)
    await replicated.until(_whole)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "seed": 7}])
@pytest.mark.parametrize("stage", [0, 1])
async def test_texts_are_the_same_when_a_replica_dies_or_hangs(
    stage: int, sampling: dict[str, Any], replicated: Replicated
) -> None:
    long = [replace(p, max_tokens=150, stops=()) for p in prompts(12, seed=3, longest=20)]
    asked = replicated.texts.decided(long)[:4]
    undisturbed = await replicated.write(asked, _nothing, **sampling)
    victim = replicated.gen.shards[stage][0]
    hangs = sampling["temperature"] != 0

    async def disturb() -> None:
        victim.signal(signal.SIGSTOP if hangs else signal.SIGKILL)

    try:
        assert await replicated.write(asked, disturb, **sampling) == undisturbed
    finally:
        if hangs:
            victim.signal(signal.SIGCONT)
        else:
            victim.wait()
            victim.start()
    await replicated.until(_whole)


@pytest.mark.parametrize("service", ["tokenizer", "stage 0", "stage 1"])
async def test_requests_wait_for_the_last_replica(service: str, replicated: Replicated) -> None:
    """All processes of a service die; who asks meanwhile is answered when one is back."""
    models = (replicated.qa, replicated.gen)
    victims = [one.tokenizing if service == "tokenizer" else one.shards[int(service[-1])]
               for one in models]  # fmt: skip
    try:
        await _wait_for_the_last(replicated, service, victims)
    finally:
        _start_again(one for replicas in victims for one in replicas)
    await replicated.until(_whole)


async def _wait_for_the_last(
    replicated: Replicated, service: str, victims: list[list[ServiceProcess]]
) -> None:
    asked = questions(6, seed=60 + len(service) + ord(service[-1]), long_every=50)
    async with http_client(replicated.url) as client, open_channel(replicated.grpc) as channel:
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)

        async def write() -> str:
            body = {"prompt": "故宫", "max_tokens": 20, "temperature": 0, "no_cache": True}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["text"])

        async def write_over_grpc() -> str:
            options = gateway_pb2.WriteOptions(
                max_tokens=20, no_cache=True, sampling=pb.SamplingParams()
            )
            request = gateway_pb2.WriteRequest(text="故宫", options=options)
            news = [part async for part in stub.Write(request, timeout=120)]
            return "".join(text.text for part in news for text in part.texts)

        undisturbed = await write()
        assert await write_over_grpc() == undisturbed
        for victim in (*victims[0], *victims[1]):
            victim.kill()
        answers = [asyncio.create_task(ask_http(client, one)) for one in asked[:3]]
        answers += [asyncio.create_task(ask_grpc(stub, one)) for one in asked[3:]]
        texts = [asyncio.create_task(write()), asyncio.create_task(write_over_grpc())]
        done, _ = await asyncio.wait([*answers, *texts], timeout=0.5)
        assert not done, [one.exception() or one.result() for one in done]
        while (await client.get("/readyz")).status_code == 200:  # at the next look at the latest
            await asyncio.sleep(0.05)
        for replicas in victims:
            replicas[0].start()
        for question, answer in zip(asked, answers, strict=True):
            expected = replicated.questions.answer(question.question, question.context)
            expected.check(await answer, question.top_k)
        assert [await text for text in texts] == [undisturbed] * 2


async def test_texts_go_on_when_the_last_tokenizer_is_back(replicated: Replicated) -> None:
    long = [replace(p, max_tokens=300, stops=()) for p in prompts(2, seed=9, longest=20)]
    undisturbed = await replicated.write(long, _nothing, temperature=0)
    victims = replicated.gen.tokenizing

    async def kill() -> None:
        for victim in victims:
            victim.kill()
        await asyncio.sleep(0.3)
        victims[0].start()

    try:
        assert await replicated.write(long, kill, temperature=0) == undisturbed
    finally:
        _start_again(victims)
    await replicated.until(_whole)


@pytest.mark.parametrize("stage", [0, 1])
async def test_draining_loses_no_question(stage: int, replicated: Replicated) -> None:
    victim = replicated.qa.shards[stage][1]

    async def stop() -> None:
        victim.ask_to_stop()
        assert await asyncio.to_thread(victim.wait) == 0

    try:
        await replicated.ask(60, 40 + stage, stop)
    finally:
        _start_again([victim])
    await replicated.until(_whole)


async def test_two_models_side_by_side(replicated: Replicated, tmp_path: Path) -> None:
    """An upgrade half done: one replica of each stage, and one tokenizer, has the new model."""
    qa = replicated.qa
    other = make_checkpoint(tmp_path / "other", "bert", layers=2, seed=5)
    old = [qa.shards[0][1], qa.shards[1][1]]
    new = [qa.shard(other, index, 1) for index in (0, 1)]
    tokenizing = qa.tokenizing[1]
    for process in (*old, tokenizing):
        process.kill()
    tokenizing.env["MIAOTUI_TOKENIZER_MODEL"] = str(other)
    try:
        for process in (*new, tokenizing):
            process.start()

        def both(pipelines: list[dict[str, Any]]) -> bool:
            replicas = pipelines[0]["stages"][0]["replicas"]
            serving = [one for one in replicas if one["state"] == "serving"]
            return len({one["model_fingerprint"] for one in serving}) == 2

        await replicated.until(both)
        references = [replicated.questions, Reference(other, max_length=384, stride=128)]
        asked = questions(40, seed=50, long_every=50)
        async with http_client(replicated.url) as client:
            bodies = await gathered(lambda q: ask_http(client, q), asked, 8)
        fingerprints = list(dict.fromkeys(body["model_fingerprint"] for body in bodies))
        assert len(fingerprints) == 2
        told = await replicated.pipelines()
        first = {one["address"]: one for one in told[0]["stages"][0]["replicas"]}
        ours = first[qa.stages[0][0]]["model_fingerprint"]
        for question, body in zip(asked, bodies, strict=True):
            reference = references[body["model_fingerprint"] != ours]
            reference.answer(question.question, question.context).check(body, question.top_k)
    finally:
        for process in new:
            if process.alive:
                process.kill()
