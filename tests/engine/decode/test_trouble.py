"""What goes wrong around the head: cancels, breaks, defects, deadlines."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from miaotui.engine.batch import Batch
from miaotui.engine.decode.head import GenerationHead
from miaotui.engine.decode.types import (
    GenerationRequest,
    GenerationUpdate,
    SampledTokens,
    TokenIds,
)
from miaotui.engine.decode.validation import InvalidRequestError
from miaotui.engine.head import ComputeError, DeadlineError
from miaotui.engine.readiness import PipelineUnavailableError
from tests.engine.decode.ring import (
    MODEL,
    Listener,
    Ring,
    check,
    copying,
    finish,
    ids,
    is_reference,
    reference,
    settings,
    turns,
)


async def test_cancelling_frees_blocks_at_once_and_tells_the_stages() -> None:
    ring = Ring(settings(stages=2), MODEL, blocks=64, block_tokens=4)
    stays, goes = Listener(), Listener()
    request = GenerationRequest(ids(*range(20)), max_tokens=60)
    ring.head.submit("r", request, stays)
    handle = ring.head.submit("r", GenerationRequest(ids(*range(30, 50)), max_tokens=60), goes)
    await turns(40)
    assert goes.texts
    used = ring.head.scheduler.tables.used
    handle.cancel()
    assert ring.head.scheduler.tables.used <= used - 5
    seen = len(goes.updates)
    await finish(stays)
    assert len(goes.updates) == seen
    assert not goes.done.is_set()
    assert is_reference(stays, request)
    assert len(ring.ended) == 1
    handle.cancel()
    check(ring)


async def test_the_one_request_that_cannot_be_computed_fails_alone() -> None:
    def fail(stage: int, batch: Batch) -> bool:
        return stage == 1 and any(
            meta.request_id.startswith("poison")
            and meta.decode
            and meta.decode.start + meta.length > 8
            for meta in batch.sequences
        )

    ring = Ring(settings(stages=2, micro_batches=1), MODEL, blocks=64, block_tokens=4, fail=fail)
    requests = [GenerationRequest(ids(n, 7, 8), max_tokens=20) for n in range(5)]
    listeners = [Listener() for _ in requests]
    for number, (request, listener) in enumerate(zip(requests, listeners, strict=True)):
        ring.head.submit("poison" if number == 2 else "good", request, listener)
    await finish(*listeners)
    assert isinstance(listeners.pop(2).error, ComputeError)
    requests.pop(2)
    assert all(map(is_reference, listeners, requests))
    check(ring)


async def test_results_that_do_not_fit_are_an_error_not_a_text() -> None:
    async def compute(batch: Batch, _ids: TokenIds) -> None:
        batch.sampled = [SampledTokens(99, ids(1))]

    head = GenerationHead(settings(), compute=compute, send=None)
    head.pipeline_up(8, 4)
    listener = Listener()
    head.submit("r", GenerationRequest(ids(1)), listener)
    await finish(listener)
    assert isinstance(listener.error, ComputeError)
    assert head.scheduler.idle


async def test_a_defect_in_computing_or_sending_hangs_nobody() -> None:
    async def defect(*_: object) -> None:
        raise RuntimeError("a defect")

    async def works(*_: object) -> None:
        await asyncio.sleep(0)

    for compute, send in ((defect, works), (works, defect)):
        head = GenerationHead(settings(stages=2), compute=compute, send=send)
        head.pipeline_up(8, 4)
        listener = Listener()
        head.submit("r", GenerationRequest(ids(1)), listener)
        await finish(listener)
        assert isinstance(listener.error, ComputeError)
        assert head.scheduler.idle


async def test_after_a_break_texts_go_on_where_they_were() -> None:
    ring = Ring(settings(stages=3, draft_tokens=4), MODEL, blocks=64, block_tokens=4)
    requests = [GenerationRequest(ids(n, 7, 8), max_tokens=40) for n in range(6)]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        ring.head.submit("r", request, listener)
    await turns(60)
    assert all(listener.texts for listener in listeners)
    assert not any(listener.done.is_set() for listener in listeners)
    ring.down()
    assert not ring.head.ready
    assert ring.head.queued == 6
    late = Listener()
    ring.head.submit("r", requests[0], late)
    await turns(5)
    ring.up()
    await finish(*listeners, late)
    assert all(map(is_reference, [*listeners, late], [*requests, requests[0]]))
    check(ring)


async def test_a_pipeline_that_breaks_again_and_again_is_given_up() -> None:
    ring = Ring(settings(stages=2, max_attempts=2), MODEL, blocks=64, block_tokens=4)
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(1)), listener)
    for _ in range(2):
        await turns(2)  # no token has come back yet: that would be progress
        ring.down()
        ring.up()
    await finish(listener)
    assert isinstance(listener.error, PipelineUnavailableError)
    assert "broke 2 times" in str(listener.error)
    check(ring)


async def test_requests_wait_for_a_pipeline_only_so_long() -> None:
    ring = Ring(settings(grace=0.3), MODEL, blocks=64, block_tokens=4)
    ring.head.pipeline_down("cut")
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(1)), listener)
    await finish(listener)
    assert isinstance(listener.error, PipelineUnavailableError)
    with pytest.raises(PipelineUnavailableError, match="cut"):
        ring.head.submit("r", GenerationRequest(ids(1)), Listener())
    check(ring)


async def test_a_pipeline_that_comes_back_smaller_keeps_what_fits() -> None:
    ring = Ring(settings(), MODEL, blocks=64, block_tokens=4)
    small, large, long = Listener(), Listener(), Listener()
    ring.head.submit("r", GenerationRequest(ids(1), max_tokens=30), small)
    ring.head.submit("r", GenerationRequest(ids(2), max_tokens=100), long)
    ring.head.submit("r", GenerationRequest(ids(*[3] * 50), max_tokens=90), large)
    await turns(25)
    ring.down()
    assert len(long.texts[0]) < 35
    ring.blocks, ring.block_tokens = 6, 6
    ring.up()
    await finish(small, large, long)
    assert is_reference(small, GenerationRequest(ids(1), max_tokens=30))
    assert is_reference(long, GenerationRequest(ids(2)), 37)
    assert isinstance(large.error, InvalidRequestError)
    check(ring)


async def test_a_deadline_ends_a_request() -> None:
    async def slow(_stage: int, _batch: Batch) -> None:
        await asyncio.sleep(0.01)

    ring = Ring(settings(), MODEL, blocks=64, block_tokens=4, pause=slow)
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(1)), listener, deadline=time.monotonic() + 1.0)
    with pytest.raises(DeadlineError):
        ring.head.submit("r", GenerationRequest(ids(1)), listener, deadline=time.monotonic())
    await finish(listener)
    assert isinstance(listener.error, DeadlineError)
    assert listener.texts
    async with asyncio.timeout(60):
        while ring.head.running_sequences or not ring.head.scheduler.idle:
            await asyncio.sleep(0.01)
    check(ring)


async def test_a_sink_with_a_defect_hurts_no_other() -> None:
    ring = Ring(settings(), MODEL, blocks=64, block_tokens=4)

    def defect(_: GenerationUpdate | Exception) -> None:
        raise RuntimeError("a defect")

    listener = Listener()
    request = GenerationRequest(ids(1), max_tokens=10)
    ring.head.submit("r", request, defect)
    ring.head.submit("r", request, listener)
    await finish(listener)
    assert is_reference(listener, request)
    check(ring)


async def test_the_iterator_yields_and_closing_it_cancels() -> None:
    ring = Ring(settings(), MODEL, blocks=64, block_tokens=4)
    request = GenerationRequest(ids(1, 2), max_tokens=12)
    written: list[int] = []
    async for update in ring.head.generate("r", request):
        for delta in update.deltas:
            written.extend(delta.token_ids.tolist())
    assert written == reference(MODEL, request, 0, 200)[0]
    updates = ring.head.generate("r", replace(request, max_tokens=0))
    await anext(updates)
    await updates.aclose()  # type: ignore[attr-defined]
    assert ring.head.open_requests == 0
    await turns(5)
    check(ring)


async def test_draining_waits_for_what_is_open() -> None:
    ring = Ring(settings(), MODEL, blocks=64, block_tokens=4)
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(1), max_tokens=10), listener)
    await ring.head.drain(60.0)
    assert listener.done.is_set()
    ring.head.pipeline_down("cut")
    ring.head.submit("r", GenerationRequest(ids(1), max_tokens=10), Listener())
    await ring.head.drain(0.05)
    assert ring.head.open_requests == 1, "it has not waited until the pipeline was given up"
    ring.close()


async def test_metrics_tell_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    ring = Ring(settings(draft_tokens=4), copying(3), blocks=64, block_tokens=4)
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(*[1, 2, 3] * 5), max_tokens=30), listener)
    await finish(listener)
    data = reader.get_metrics_data()
    assert data is not None
    found: dict[str, Any] = {
        metric.name.removeprefix("miaotui.generate."): list(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }

    def value(name: str) -> float:
        return float(found[name][0].value)

    assert value("tokens") == 30
    assert value("prompt.tokens") == 15
    assert value("drafted.tokens") >= value("accepted.tokens") > 15
    assert value("prompt.shared_tokens") == 0
    outcomes = {point.attributes["miaotui.outcome"]: point.value for point in found["requests"]}
    assert outcomes == {"complete": 1, "failed": 0, "cancelled": 0}
    for name, count in {
        "queue.duration": 1,
        "batch.tokens": len(ring.batches),
        "batch.sequences": len(ring.batches),
    }.items():
        assert found[name][0].count == count
    provider.shutdown()
    check(ring)
