"""Random lives of a decoder's pipeline: whatever happens, every text is the model's own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, event, given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from miaotui.engine.batch import Batch
from miaotui.engine.decode.head import Handle
from miaotui.engine.decode.settings import GenerationSettings
from miaotui.engine.decode.types import GenerationRequest, SamplingParams
from miaotui.engine.decode.validation import InvalidRequestError
from miaotui.engine.head import ComputeError
from miaotui.engine.readiness import PipelineUnavailableError
from tests.engine.decode.ring import Listener, Ring, chaos, copying, ids, reference

_VOCABULARY = 5
_CONTEXT = 48


@dataclass(frozen=True)
class _Call:
    request: GenerationRequest
    delay: int
    """Turns of the loop after the one before."""
    cancel_after: int | None
    """Updates."""


@dataclass(frozen=True)
class _Scenario:
    settings: GenerationSettings
    blocks: int
    block_tokens: int
    period: int
    """Of a model that repeats itself; 0: one that does not."""
    calls: list[_Call]
    failures: frozenset[int]
    """Batches that a stage fails to compute."""
    breaks: frozenset[int]
    """Batches at which a link breaks."""
    seed: int


@st.composite
def _scenarios(draw: st.DrawFn) -> _Scenario:
    stages = draw(st.integers(1, 3))
    stems = [draw(st.lists(st.integers(0, _VOCABULARY - 1), max_size=20)) for _ in range(2)]

    def call() -> _Call:
        tail = draw(st.lists(st.integers(0, _VOCABULARY - 1), min_size=1, max_size=8))
        request = GenerationRequest(
            ids(*draw(st.sampled_from(stems)), *tail),
            SamplingParams(
                seed=draw(st.integers(0, 3)),
                repetition_penalty=draw(st.sampled_from([1.0, 1.1])),
            ),
            max_tokens=draw(st.one_of(st.just(0), st.integers(1, 25))),
            stop_token_ids=draw(st.sampled_from([frozenset(), frozenset(), frozenset([1])])),
            n=draw(st.sampled_from([1, 1, 1, 2, 3])),
            draft_tokens=draw(st.sampled_from([None, None, 0, 3])),
        )
        return _Call(
            request,
            draw(st.sampled_from([0, 0, 0, 1, 5, 20, 60])),
            draw(st.sampled_from([None, None, None, 0, 1, 3])),
        )

    troubled = draw(st.booleans())
    accidents = st.frozensets(st.integers(2, 40), max_size=2)
    return _Scenario(
        GenerationSettings(
            stages=stages,
            vocabulary=_VOCABULARY,
            context=_CONTEXT,
            max_in_flight=draw(st.integers(1, stages + 2)),
            micro_batches=draw(st.integers(0, 3)),
            batch_tokens=draw(st.integers(1, 40)),
            chunk_tokens=draw(st.integers(1, 20)),
            max_running=draw(st.integers(1, 8)),
            draft_tokens=draw(st.sampled_from([0, 2, 6])),
            draft_batch_tokens=draw(st.sampled_from([4, 64])),
            prefix_cache=draw(st.booleans()),
            grace=30.0,
        ),
        blocks=draw(st.one_of(st.integers(6, 12), st.integers(6, 40))),
        block_tokens=draw(st.integers(1, 5)),
        period=draw(st.sampled_from([0, 0, 3])),
        calls=[call() for _ in range(draw(st.integers(2, 8)))],
        failures=draw(accidents) if troubled else frozenset(),
        breaks=draw(accidents) if troubled else frozenset(),
        seed=draw(st.integers(0, 1000)),
    )


def _delays(seed: int) -> Callable[[int, Batch], object]:
    generator = random.Random(seed)

    async def pause(_stage: int, _batch: Batch) -> None:
        for _ in range(generator.choice([0, 0, 1, 3, 8])):
            await asyncio.sleep(0)

    return pause


class _Impatient(Listener):
    """Cancels after so many updates (0: at once)."""

    def __init__(self, patience: int | None) -> None:
        super().__init__()
        self.patience = patience
        self.cancelled = False
        self._handle: Handle | None = None

    @property
    def handle(self) -> Handle | None:
        return self._handle

    @handle.setter
    def handle(self, handle: Handle) -> None:
        self._handle = handle
        if self.patience == 0:
            self._cancel()

    def _cancel(self) -> None:
        assert self._handle is not None
        self._handle.cancel()
        self.cancelled = True
        self.done.set()

    def __call__(self, update: object) -> None:
        super().__call__(update)  # type: ignore[arg-type]
        if len(self.updates) == self.patience and not self.done.is_set():
            self._cancel()


async def _live(scenario: _Scenario) -> None:
    model = copying(scenario.period) if scenario.period else chaos(_VOCABULARY)
    failed: set[int] = set()
    broken: set[int] = set()
    cuts: list[asyncio.Task[None]] = []

    async def cut() -> None:
        if not ring.head.ready:
            return
        ring.down()
        for _ in range(5):
            await asyncio.sleep(0)
        ring.up()

    def fail(_stage: int, batch: Batch) -> bool:
        if batch.batch_id in scenario.breaks - broken:
            broken.add(batch.batch_id)
            cuts.append(asyncio.create_task(cut()))
        if batch.batch_id in scenario.failures - failed:
            failed.add(batch.batch_id)
            return True
        return False

    ring = Ring(
        scenario.settings,
        model,
        scenario.blocks,
        scenario.block_tokens,
        pause=_delays(scenario.seed),
        fail=fail,
    )
    calls: list[tuple[_Call, _Impatient]] = []
    capacity = scenario.blocks * scenario.block_tokens
    for number, call in enumerate(scenario.calls):
        for _ in range(call.delay):
            await asyncio.sleep(0)
        listener = _Impatient(call.cancel_after)
        fits = len(call.request.prompt) + 1 <= capacity
        try:
            listener.handle = ring.head.submit(f"{number}", call.request, listener)
        except InvalidRequestError:
            assert not fits
            continue
        assert fits
        calls.append((call, listener))
    try:
        async with asyncio.timeout(10):
            for _, listener in calls:
                await listener.done.wait()
            while cuts and not cuts[-1].done():
                await asyncio.sleep(0)
    except TimeoutError:
        raise AssertionError(f"stuck: {ring.problems}") from None
    assert not ring.problems
    for call, listener in calls:
        if isinstance(listener.error, ComputeError):
            assert failed
        elif isinstance(listener.error, PipelineUnavailableError):
            assert len(broken) + len(failed) >= scenario.settings.max_attempts
        else:
            assert listener.error is None
        complete = listener.error is None and not listener.cancelled
        for index in range(call.request.n):
            text, reason = reference(model, call.request, index, min(_CONTEXT, capacity + 1))
            got = listener.texts.get(index, [])
            assert got == (text if complete else text[: len(got)])
            assert listener.reasons.get(index) is (reason if complete else None) or not complete
        if complete:
            usage = listener.updates[-1].usage
            assert usage is not None
            assert usage.completion_tokens == sum(map(len, listener.texts.values()))
            assert usage.accepted_tokens <= usage.drafted_tokens
            assert usage.cached_tokens < usage.prompt_tokens == len(call.request.prompt)
            event("preempted" if usage.preemptions else "not preempted")
            event("shared" if usage.cached_tokens else "not shared")
            event("drafts right" if usage.accepted_tokens else "no drafts right")
    scheduler = ring.head.scheduler
    assert scheduler.tables.pool is not None
    assert scheduler.tables.pool.used == 0
    assert ring.head.open_requests == ring.head.running_sequences == ring.head.queued == 0
    assert scheduler.idle
    ring.close()


@bounds(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(_scenarios())
def test_whatever_happens_every_text_is_the_models(scenario: _Scenario) -> None:
    asyncio.run(_live(scenario))
