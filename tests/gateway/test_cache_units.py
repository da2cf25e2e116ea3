"""Keys, envelopes, breaker, single flight, and the embedded cache."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cache.backend import ENTRY_OVERHEAD_BYTES, EmbeddedBackend
from gateway.cache.singleflight import SingleFlight
from gateway.cache.stores import AnswerCache, PromptCache, SealedStore, StoredAnswer, StoredSpan
from gateway.explanation import WarningView
from gateway.schema import QaRequest
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.cache.breaker import Breaker
from services.cache.codec import Sealer
from services.cache.redis import RedisBackend
from tests.gateway.conftest import until

REQUEST = QaRequest.model_validate({"question": "When?", "context": "In 1925."})


class Counted:
    """Counts look-ups as GatewayMetrics does."""

    def __init__(self) -> None:
        self.results: list[tuple[str, str]] = []

    def lookup(self, cache: str, result: str) -> None:
        self.results.append((cache, result))


def make_store(
    name: str, backend: EmbeddedBackend, counted: Counted, secret: str = "s", limit: int = 10_000
) -> SealedStore:
    return SealedStore(name, backend, Sealer(secret), counted, limit)  # type: ignore[arg-type]


ANSWER = StoredAnswer(True, -3.5, [StoredSpan(3, 7, 0.75, 11.0)])
WARNING = WarningView("repetition", "The passage repeats itself.", 0.75)


@pytest.mark.parametrize("warnings", [None, [], [WARNING]])
async def test_warnings_are_kept_with_the_answer(warnings: list[WarningView] | None) -> None:
    cache = AnswerCache(make_store("answer", EmbeddedBackend(10_000, 60), Counted()))
    key = cache.key("model", REQUEST)
    await cache.put(key, replace(ANSWER, warnings=warnings))
    found = await cache.get(key, REQUEST)
    assert found is not None
    assert found.warnings == warnings


async def test_an_answer_that_an_older_gateway_kept_is_found() -> None:
    cache = AnswerCache(make_store("answer", EmbeddedBackend(10_000, 60), Counted()))
    key = cache.key("model", REQUEST)
    span = '{"start":3,"end":7,"score":0.75,"logit":11.0}'
    older = f'{{"answerable":true,"no_answer_score":-3.5,"spans":[{span}],"unknown":0.0}}'
    await cache.store.write(key, older.encode())
    assert await cache.get(key, REQUEST) == ANSWER


async def test_answer_is_kept_and_found() -> None:
    counted = Counted()
    cache = AnswerCache(make_store("answer", EmbeddedBackend(10_000, 60), counted))
    key = cache.key("model", REQUEST)
    assert await cache.get(key, REQUEST) is None
    await cache.put(key, ANSWER)
    assert await cache.get(key, REQUEST) == ANSWER
    assert counted.results == [("answer", "miss"), ("answer", "hit")]


@pytest.mark.parametrize(
    "change",
    [
        {"question": "Where?"},
        {"context": "In 1926."},
        {"top_k": 2},
        {"max_answer_length": 31},
        {"no_answer_threshold": 0.0},
        {"normalization": "nfkc"},
        {"strip_markup": True},
    ],
)
def test_each_parameter_is_part_of_the_key(change: dict[str, Any]) -> None:
    cache = AnswerCache(make_store("answer", EmbeddedBackend(1000, 60), Counted()))
    other = REQUEST.model_copy(update=change)
    keys = {
        cache.key("model", REQUEST),
        cache.key("model", other),
        cache.key("other model", REQUEST),
    }
    assert len(keys) == 3


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_keys_differ_where_parts_differ(first: list[str], second: list[str]) -> None:
    sealer = Sealer("secret")
    same = sealer.key(b"k", *(p.encode("utf-8", "replace") for p in first)) == sealer.key(
        b"k", *(p.encode("utf-8", "replace") for p in second)
    )
    encoded = [[p.encode("utf-8", "replace") for p in parts] for parts in (first, second)]
    assert same == (encoded[0] == encoded[1])


def test_keys_depend_on_the_secret_and_reveal_nothing() -> None:
    one, other = Sealer("one").key(b"k", "passage"), Sealer("other").key(b"k", "passage")
    assert one != other
    assert b"passage" not in one


@pytest.mark.parametrize("encryption", [None, "e" * 32])
@given(payload=st.binary(max_size=200), data=st.data())
def test_only_what_was_wrapped_opens(
    encryption: str | None, payload: bytes, data: st.DataObject
) -> None:
    sealer = Sealer("secret", encryption)
    value = sealer.wrap(b"key", payload)
    assert sealer.open(b"key", value) == payload
    position = data.draw(st.integers(0, len(value) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(value)
    changed[position] ^= 1 << bit
    assert sealer.open(b"key", bytes(changed)) is None
    assert sealer.open(b"key", value[:position]) is None
    assert sealer.open(b"key", value + b"x") is None
    assert sealer.open(b"other key", value) is None
    assert Sealer("other", encryption).open(b"key", value) is None
    assert Sealer("secret", "f" * 32).open(b"key", value) is None


def test_encrypted_values_cannot_be_read_and_differ_each_time() -> None:
    sealer, plain = Sealer("secret", "e" * 32), Sealer("secret")
    values = {sealer.wrap(b"key", b"the passage") for _ in range(10)}
    assert len(values) == 10
    assert all(b"passage" not in value and len(value) == 1 + 12 + 11 + 16 for value in values)
    # Neither takes the other's: who turns encryption on reads nothing that lay open before.
    assert sealer.open(b"key", plain.wrap(b"key", b"the passage")) is None
    assert plain.open(b"key", values.pop()) is None


async def test_garbage_is_a_counted_miss() -> None:
    counted, backend = Counted(), EmbeddedBackend(10_000, 60)
    store = make_store("answer", backend, counted)
    cache = AnswerCache(store)
    key = cache.key("model", REQUEST)
    for garbage in (b"", b"\xff" * 40, Sealer("s").wrap(key, b'{"answerable": 1}')):
        await backend.put(key, garbage)
        assert await cache.get(key, REQUEST) is None
    # Well sealed, and yet outside of the passage.
    await cache.put(key, StoredAnswer(True, 0.0, [StoredSpan(5, 900, 0.5, 1.0)]))
    assert await cache.get(key, REQUEST) is None
    assert counted.results == [("answer", "garbage")] * 4


async def test_prompt_that_does_not_fit_the_passage_is_garbage() -> None:
    counted = Counted()
    cache = PromptCache(make_store("prompt", EmbeddedBackend(10_000, 60), counted))
    key = cache.key("tokenizer", REQUEST)
    text = tokenizer_pb.TokenizedText(
        input_ids=bytes(8), starts=bytes(8), ends=bytes(8), characters=len(REQUEST.context)
    )
    await cache.put(key, text)
    assert await cache.get(key, REQUEST) == text
    text.ends = bytes(4)
    await cache.put(key, text)
    assert await cache.get(key, REQUEST) is None
    assert counted.results == [("prompt", "hit"), ("prompt", "garbage")]


async def test_large_values_are_not_kept() -> None:
    counted = Counted()
    cache = AnswerCache(make_store("answer", EmbeddedBackend(10_000, 60), counted, limit=20))
    key = cache.key("model", REQUEST)
    await cache.put(key, ANSWER)
    assert await cache.get(key, REQUEST) is None


async def test_embedded_cache_is_bounded_in_bytes_and_drops_the_least_recent() -> None:
    size = 100 + ENTRY_OVERHEAD_BYTES
    backend = EmbeddedBackend(3 * size, 60)
    for name in (b"a", b"b", b"c"):
        await backend.put(name, bytes(100))
    assert await backend.get(b"a") is not None
    await backend.put(b"d", bytes(100))
    assert backend.bytes_held <= 3 * size
    assert await backend.get(b"b") is None
    assert await backend.get(b"a") is not None
    await backend.put(b"whole", bytes(4 * size))
    assert await backend.get(b"whole") is None
    assert await backend.get(b"a") is not None


async def test_embedded_cache_forgets_after_its_ttl() -> None:
    clock = 0.0
    backend = EmbeddedBackend(10_000, 60, lambda: clock)
    await backend.put(b"a", b"1")
    clock = 59.0
    assert await backend.get(b"a") == b"1"
    clock = 61.0
    assert await backend.get(b"a") is None


async def test_breaker_opens_heals_by_itself_and_logs_each_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    works = False
    probes = 0

    async def probe() -> bool:
        nonlocal probes
        probes += 1
        return works

    breaker = Breaker("Redis", probe, pause=0.01)
    assert not breaker.is_open
    breaker.failed("no reply")
    await until(lambda: breaker.is_open and probes > 1)
    works = True
    await until(lambda: not breaker.is_open)
    breaker.succeeded()
    breaker.succeeded()
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        "Redis does not work",
        "Redis works again",
    ]
    await breaker.close()


async def test_a_burst_of_failures_neither_opens_the_breaker_nor_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def probe() -> bool:
        return True

    breaker = Breaker("Redis", probe, pause=0.01)
    for _ in range(50):
        breaker.failed("no reply")
    await asyncio.sleep(0.02)
    breaker.succeeded()
    assert not breaker.is_open
    assert not caplog.records
    await breaker.close()


async def test_failures_that_go_on_open_the_breaker_whatever_probes_say(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def probe() -> bool:
        return True

    breaker = Breaker("Redis", probe, pause=0.01)
    opened = 0
    for _ in range(90):
        breaker.failed("no reply")
        opened += breaker.is_open
        await asyncio.sleep(0.01)
    assert opened >= 2
    await breaker.close()
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == ["Redis does not work"]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_that_the_client_of_redis_swallows_is_passed_on(fails: bool) -> None:
    """As redis-py does, by `asyncio.wait_for`, where its work is done at that moment."""
    backend = RedisBackend("redis://127.0.0.1:1/0", 60, 60.0, lambda _: None)
    waiting = asyncio.Event()

    async def operation() -> bytes:
        waiting.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if fails:
            raise ConnectionError
        return b"done all the same"

    task = asyncio.create_task(backend.guarded(operation))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await backend.close()


class Work:
    """A computation that can be watched."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def run(self) -> int:
        self.started += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return 42


def begin(flights: SingleFlight[str, int], work: Work) -> asyncio.Task[int]:
    flight = flights.join("k") or flights.start("k", work.run)
    return asyncio.create_task(flights.wait("k", flight))


async def test_equal_requests_share_one_computation() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    tasks = [begin(flights, work) for _ in range(50)]
    await asyncio.sleep(0)
    work.go.set()
    assert await asyncio.gather(*tasks) == [42] * 50
    assert work.started == 1
    await asyncio.sleep(0)
    assert len(flights) == 0


async def test_the_first_asker_may_go_without_harm_to_the_others() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    first, second = begin(flights, work), begin(flights, work)
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    assert work.cancelled == 0
    work.go.set()
    assert await second == 42
    assert first.cancelled()


async def test_work_that_nobody_waits_for_is_cancelled_and_not_joined() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    tasks = [begin(flights, work) for _ in range(3)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert flights.join("k") is None
    again = begin(flights, work)
    await asyncio.sleep(0.01)
    assert work.cancelled == 1
    assert work.started == 2
    work.go.set()
    assert await again == 42


async def test_a_failure_reaches_every_waiter_and_is_not_kept() -> None:
    flights: SingleFlight[str, int] = SingleFlight()

    async def fail() -> int:
        await asyncio.sleep(0.01)
        raise ValueError("no")

    async def one() -> int:
        flight = flights.join("k") or flights.start("k", fail)
        return await flights.wait("k", flight)

    results = await asyncio.gather(one(), one(), return_exceptions=True)
    assert [type(result) for result in results] == [ValueError, ValueError]
    assert flights.join("k") is None
