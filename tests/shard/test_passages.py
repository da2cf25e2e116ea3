"""What stage 0 has computed of passages, in a real Redis: shared, sealed, and in nobody's way."""

from __future__ import annotations

import asyncio
import itertools
import math
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from redis.asyncio import Redis

from miaotui.engine.batch import Batch, CancelledSet, SequenceMeta
from miaotui.engine.runner import StageRunner
from miaotui.engine.scheduler import Job
from miaotui.engine.worker import ComputeWorker
from miaotui.models.stage import StageBatch, StageModel
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import shard_pb2_grpc
from services.cache.redis import PREFIX
from services.rpc.channel import open_channel
from services.shard.passages import SharedPassages, pack, share_passages, unpack
from services.shard.settings import ShardSettings
from tests.checkpoints import decomposed, make_checkpoint
from tests.processes import Cluster, RedisServer, free_port

KEYS = PREFIX + b"passage:*"
Logits = npt.NDArray[np.float32]
Counts = Counter[str]
# No machine is so busy that an operation takes longer.
PATIENT = 60.0
QUESTION, PASSAGE = 6, 30
LENGTH = QUESTION + PASSAGE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("passages") / "bert"
    return decomposed(make_checkpoint(directory, "bert", layers=3), 2)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


def question(
    number: int = 0, passage: int = 0
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Ids and types of a question on a passage; both are random, of a number each."""
    asked = np.random.default_rng(number).integers(5, 300, QUESTION, dtype=np.int32)
    text = np.random.default_rng(1000 + passage).integers(5, 300, PASSAGE, dtype=np.int32)
    types = (np.arange(LENGTH) >= QUESTION).astype(np.uint8)
    return np.concatenate([asked, text]), types


def batch(number: int = 0, passage: int = 0, salt: bytes = b"") -> StageBatch:
    ids, types = question(number, passage)
    return StageBatch([LENGTH], torch.from_numpy(ids), torch.from_numpy(types), salts=[salt])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_as_they_were_or_nothing(dtype: torch.dtype) -> None:
    hidden = torch.randn(7, 5).to(dtype)
    payload = pack(hidden)
    assert len(payload) == 13 + 35 * dtype.itemsize
    found = unpack(payload, (7, 5), dtype)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, hidden)
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    assert unpack(payload, (7, 5), other) is None
    for shape in ((5, 7), (35, 1), (7, 6)):
        assert unpack(payload, shape, dtype) is None
    for damaged in (b"", payload[:12], payload[:-1], payload + b"\0", b"x" + payload[1:]):
        assert unpack(damaged, (7, 5), dtype) is None


@asynccontextmanager
async def shared(
    directory: Path, url: str, dtype: str = "float32", **settings: Any
) -> AsyncIterator[tuple[StageModel, SharedPassages]]:
    """A model, as stage 0 has it, and its passages in Redis."""
    loaded = StageModel.load(directory, dtype=dtype, device="cpu", passage_cache_bytes=1 << 20)
    given = ShardSettings.model_validate(
        {
            "model": directory,
            "passage_redis_url": url,
            "passage_redis_secret": "secret",
            "passage_redis_timeout": PATIENT,
            **settings,
        }
    )
    passages = share_passages(given, loaded)
    assert passages is not None
    try:
        yield loaded, passages
    finally:
        await passages.close()


async def until_written(redis: Redis, count: int) -> list[bytes]:
    deadline = time.monotonic() + PATIENT
    while len(keys := [key async for key in redis.scan_iter(KEYS)]) < count:
        assert time.monotonic() < deadline, keys
        await asyncio.sleep(0.02)
    assert len(keys) == count
    return keys


async def test_what_opens_for_whom(model: Path, redis_server: RedisServer) -> None:
    encrypted: dict[str, Any] = {"passage_redis_encryption_key": "k" * 32}
    asked = batch()
    async with Redis.from_url(redis_server.url) as redis:
        async with shared(model, redis_server.url) as (writer, passages):
            assert await passages.find(asked) == {}
            expected = writer.run(asked)
            (key,) = await until_written(redis, 1)
            # What is in memory is not asked for.
            assert await passages.find(asked) is None
        value = await redis.get(key)
        assert isinstance(value, bytes)
        assert 0 < await redis.ttl(key) <= 3600
        ids = question()[0][QUESTION:].tobytes()
        assert ids not in key + value
        async with shared(model, redis_server.url) as (reader, passages):
            found = await passages.find(asked)
            assert found is not None
            assert len(found) == 1
            assert reader.passages is not None
            logits = reader.run(replace(asked, found=found))
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            assert (reader.passages.shared, reader.passages.misses) == (1, 0)
            # From memory, now; and nothing of it was written again.
            reader.run(replace(asked, found=found))
            assert (reader.passages.hits, reader.passages.shared) == (1, 1)
            # Of another tenant, or another passage.
            assert await passages.find(batch(salt=b"tenant")) == {}
            assert await passages.find(batch(passage=1)) == {}
        # With another secret, for those who encrypt, or computed otherwise.
        for others in ({"passage_redis_secret": "other"}, encrypted, {"dtype": "bfloat16"}):
            async with shared(model, redis_server.url, **others) as (_, passages):
                assert await passages.find(asked) == {}
        async with shared(model, redis_server.url, **encrypted) as (writer, passages):
            writer.run(asked)
            deadline = time.monotonic() + PATIENT
            while await redis.get(key) == value:  # the key is hashed by the secret alone
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
        async with shared(model, redis_server.url, **encrypted) as (_, passages):
            assert len(await passages.find(asked) or {}) == 1


async def test_a_look_has_a_span_of_its_own(model: Path, redis_server: RedisServer) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    asked = batch()
    assert asked.input_ids is not None
    assert asked.token_type_ids is not None
    ids, types = asked.input_ids.numpy(), asked.token_type_ids.numpy()
    trace = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    async with shared(model, redis_server.url) as (loaded, passages):
        worker = ComputeWorker(loaded)
        runner = StageRunner(worker, stage=0, passages=passages)
        runner.observer._tracer = provider.get_tracer("test")
        for number in (1, 2):  # the second finds it in memory, and need not look
            job = Job(SequenceMeta(str(number), 0, LENGTH, math.inf, trace), ids, types, b"")
            await runner.compute(Batch(number, [job.meta]), CancelledSet(), [job])
        await asyncio.sleep(0)  # spans of the computation come a turn of the loop later
        runner.close()
    spans = exporter.get_finished_spans()
    names = Counter(span.name for span in spans)
    assert (names["stage 0 passages"], names["stage 0 compute"]) == (1, 2)
    (look,) = (span for span in spans if span.name == "stage 0 passages")
    assert look.attributes is not None
    assert look.attributes["miaotui.passages.found"] == 0
    assert look.parent is not None
    assert f"{look.parent.trace_id:032x}" == "1" * 32


async def test_large_passages_are_neither_written_nor_read(
    model: Path, redis_server: RedisServer
) -> None:
    size = PASSAGE * 32 * 4
    async with Redis.from_url(redis_server.url) as redis:
        small: dict[str, Any] = {"passage_redis_entry_bytes": size - 1}
        async with shared(model, redis_server.url, **small) as (writer, _):
            writer.run(batch())
            # One that is small enough comes after it, and is written.
            ids, types = question(passage=1)
            shorter = torch.from_numpy(ids[:-1]), torch.from_numpy(types[:-1])
            writer.run(StageBatch([LENGTH - 1], *shorter, salts=[b""]))
            await until_written(redis, 1)
        async with shared(model, redis_server.url) as (writer, _):
            writer.run(batch())
            await until_written(redis, 2)
        async with shared(model, redis_server.url, **small) as (_, passages):
            assert await passages.find(batch()) is None
        async with shared(model, redis_server.url) as (_, passages):
            assert len(await passages.find(batch()) or {}) == 1


async def test_a_redis_that_hangs_is_left_alone_until_it_answers(
    model: Path, redis_server: RedisServer
) -> None:
    asked = batch()
    async with Redis.from_url(redis_server.url) as redis:
        async with shared(model, redis_server.url) as (writer, _):
            writer.run(asked)
            await until_written(redis, 1)
        hasty: dict[str, Any] = {"passage_redis_timeout": 0.05}
        async with shared(model, redis_server.url, **hasty) as (_, passages):
            redis_server.signal(signal.SIGSTOP)
            deadline = time.monotonic() + PATIENT
            while passages.healthy:
                assert time.monotonic() < deadline
                assert not await passages.find(asked)
            # Nothing waits for it: not even a turn of the loop.
            with pytest.raises(StopIteration) as result:
                passages.find(asked).send(None)
            assert result.value.value is None
            redis_server.signal(signal.SIGCONT)
            deadline = time.monotonic() + PATIENT
            while not await passages.find(asked):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)


def test_settings_are_refused_where_nothing_would_be_sealed(model: Path) -> None:
    def settings(**given: str) -> ShardSettings:
        named = {f"passage_redis_{name}": value for name, value in given.items()}
        return ShardSettings.model_validate({"model": model, **named})

    url = "redis://127.0.0.1:6379/0"
    assert settings(url=url, secret="s").passage_redis_url is not None
    with pytest.raises(ValidationError, match="needs passage_redis_secret"):
        settings(url=url)
    with pytest.raises(ValidationError, match="needs passage_redis_secret"):
        settings(url=url, secret="")
    with pytest.raises(ValidationError, match="at least 32 characters"):
        settings(url=url, secret="s", encryption_key="short")


def more(counted: str, than: int) -> Callable[[Counts], bool]:
    return lambda counts: counts[counted] > than


class Stage0:
    """A stage 0 in its own process, whose memory is too small for any passage."""

    def __init__(self, model: Path, redis: RedisServer) -> None:
        self._metrics = free_port()
        self.cluster = Cluster(
            model,
            stages=1,
            only_shards=True,
            shard_env={
                "MIAOTUI_SHARD_METRICS_PORT": str(self._metrics),
                "MIAOTUI_SHARD_PASSAGE_CACHE_BYTES": "1",
                "MIAOTUI_SHARD_PASSAGE_REDIS_URL": redis.url,
                "MIAOTUI_SHARD_PASSAGE_REDIS_SECRET": "secret",
                "MIAOTUI_SHARD_PASSAGE_REDIS_TIMEOUT": str(PATIENT),
            },
        )
        self._numbers = itertools.count()

    async def serving(self) -> None:
        deadline = time.monotonic() + 240
        while (await self.cluster.describe(0)).status != pb.STAGE_STATUS_SERVING:
            assert time.monotonic() < deadline, self.cluster.logs()
            await asyncio.sleep(0.05)

    async def ask(self, number: int = 0, salt: bytes = b"") -> Logits:
        """Start and end logits, [2, tokens]."""
        ids, types = question(number)
        sequence = pb.TokenSequence(input_ids=ids.tobytes(), token_type_ids=types.tobytes())
        name = str(next(self._numbers))
        request = pb.InferRequest(request_id=name, sequences=[sequence], cache_salt=salt)
        async with open_channel(self.cluster.stage_targets[0]) as channel:
            stub = shard_pb2_grpc.ShardServiceStub(channel)
            response: pb.InferResponse = await stub.Infer(request, timeout=PATIENT)
        (logits,) = response.logits
        return np.stack([np.frombuffer(part, "<f4") for part in (logits.start, logits.end)])

    async def ask_until(
        self, holds: Callable[[Counts], bool], expected: Logits, salt: bytes = b""
    ) -> Counts:
        """Asks until that is so; every answer must be the expected one."""
        deadline = time.monotonic() + PATIENT
        while not holds(counts := await self.counts()):
            assert time.monotonic() < deadline, f"{counts}\n{self.cluster.logs()}"
            np.testing.assert_allclose(await self.ask(salt=salt), expected, atol=1e-4)
        return counts

    async def counts(self) -> Counts:
        """Passages by where they were taken from, Redis's failures by reason, whether it is up."""
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENT) as client:
            text = (await client.get(f"http://127.0.0.1:{self._metrics}/metrics")).text
        names = {
            "miaotui_stage_passages_total": "miaotui_cache_result",
            "miaotui_stage_passages_redis_failures_total": "reason",
            "miaotui_stage_passages_redis_up": "up",
        }
        counts: Counts = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if (label := names.get(sample.name)) is not None:
                    counts[sample.labels.get(label, label)] = int(sample.value)
        return counts


async def test_a_restarted_stage_takes_its_passages_from_redis(
    model: Path, redis_server: RedisServer
) -> None:
    plain = StageModel.load(model, device="cpu", dtype="float32")
    expected = plain.run(batch()).numpy().T
    stage = Stage0(model, redis_server)
    async with stage.cluster, Redis.from_url(redis_server.url) as redis:
        await stage.serving()
        np.testing.assert_allclose(await stage.ask(), expected, atol=1e-4)
        # Without room in memory, it reads what it has written.
        await stage.ask_until(more("redis", 0), expected)
        (shard,) = stage.cluster.shards
        await asyncio.to_thread(shard.stop)
        shard.start()
        await stage.serving()
        assert await stage.counts() == {"hit": 0, "redis": 0, "miss": 0, "up": 1}
        await stage.ask_until(more("redis", 0), expected)
        # Another question on it.
        other = plain.run(batch(1)).numpy().T
        np.testing.assert_allclose(await stage.ask(1), other, atol=1e-4)

        # Another tenant's is computed, and kept apart.
        before = await stage.counts()
        np.testing.assert_allclose(await stage.ask(salt=b"tenant"), expected, atol=1e-4)
        after = await stage.counts()
        assert (after["redis"], after["miss"]) == (before["redis"], before["miss"] + 1)
        await stage.ask_until(more("redis", after["redis"]), expected, b"tenant")
        await until_written(redis, 2)


async def test_no_request_fails_for_damaged_values_and_dead_servers(
    model: Path, redis_server: RedisServer
) -> None:
    expected = StageModel.load(model, device="cpu", dtype="float32").run(batch()).numpy().T
    stage = Stage0(model, redis_server)
    async with stage.cluster, Redis.from_url(redis_server.url) as redis:
        await stage.serving()
        before = await stage.ask_until(more("redis", 0), expected)
        (key,) = await until_written(redis, 1)
        value = await redis.get(key)
        assert isinstance(value, bytes)
        for damaged in (value[:-1] + bytes([value[-1] ^ 1]), value[:-4], b"x" * len(value)):
            deadline = time.monotonic() + PATIENT
            # A write that was under way mends it: then once more.
            while (now := await stage.counts())["garbage"] == before["garbage"]:
                assert time.monotonic() < deadline, stage.cluster.logs()
                await redis.set(key, damaged)
                np.testing.assert_allclose(await stage.ask(), expected, atol=1e-4)
            assert now["miss"] > before["miss"]
            # It was computed and written anew.
            before = await stage.ask_until(more("redis", now["redis"]), expected)

        redis_server.kill()
        down = await stage.ask_until(lambda now: not now["up"], expected)
        await stage.ask_until(more("miss", down["miss"] + 5), expected)
        assert (await stage.counts())["up"] == 0
        redis_server.start()
        await stage.ask_until(more("redis", before["redis"]), expected)
