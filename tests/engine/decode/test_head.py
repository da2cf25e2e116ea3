"""The head of a decoder's pipeline over stages that check what they are sent."""

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
    FinishReason,
    GenerationRequest,
    GenerationUpdate,
    PlaceLogprobs,
    SampledTokens,
    SamplingParams,
    TokenIds,
)
from miaotui.engine.decode.validation import InvalidRequestError
from miaotui.engine.head import ComputeError, DeadlineError, PipelineUnavailableError
from miaotui.engine.scheduler import QueueFullError
from tests.engine.decode.ring import (
    Listener,
    Ring,
    chaos,
    copying,
    ids,
    reference,
    settings,
)

_MODEL = chaos(50)


async def _finish(*listeners: Listener) -> None:
    async with asyncio.timeout(10):
        for listener in listeners:
            await listener.done.wait()


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _check(ring: Ring) -> None:
    """Nothing is left behind."""
    assert not ring.problems
    assert ring.head.scheduler.idle
    assert ring.head.open_requests == ring.head.running_sequences == ring.head.queued == 0
    ring.close()


def _is_reference(listener: Listener, request: GenerationRequest, limit: int = 200) -> bool:
    return listener.error is None and all(
        (listener.texts[index], listener.reasons[index]) == reference(_MODEL, request, index, limit)
        for index in range(request.n)
    )


# -- texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_texts_are_what_the_model_writes(stages: int) -> None:
    ring = Ring(settings(stages=stages), _MODEL, blocks=64, block_tokens=4)
    requests = [
        GenerationRequest(ids(*range(1, 2 + 5 * n)), max_tokens=3 + n, n=1 + n % 2)
        for n in range(8)
    ]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        ring.head.submit("r", request, listener)
        await asyncio.sleep(0)
    await _finish(*listeners)
    for request, listener in zip(requests, listeners, strict=True):
        assert _is_reference(listener, request)
        usage = listener.updates[-1].usage
        assert usage is not None
        assert usage.prompt_tokens == len(request.prompt)
        assert usage.completion_tokens == request.n * request.max_tokens
    _check(ring)


async def test_the_same_seed_gives_the_same_text_and_texts_of_a_request_differ() -> None:
    ring = Ring(settings(), _MODEL, blocks=64, block_tokens=4)
    first, second = Listener(), Listener()
    request = GenerationRequest(ids(1, 2, 3), SamplingParams(seed=2**64 - 1), 8, n=2)
    ring.head.submit("a", request, first)
    ring.head.submit("b", replace(request, sampling=SamplingParams(seed=0), n=1), second)
    await _finish(first, second)
    assert first.texts[0] != first.texts[1] == second.texts[0]
    _check(ring)


async def test_a_stop_token_is_the_last_one_even_amid_a_draft() -> None:
    ring = Ring(settings(draft_tokens=8), copying(5), blocks=64, block_tokens=4)
    listener = Listener()
    request = GenerationRequest(
        ids(1, 2, 3, 4, 5, 1, 2, 3), stop_token_ids=frozenset([1]), max_tokens=50
    )
    ring.head.submit("r", request, listener)
    await _finish(listener)
    assert listener.texts == {0: [4, 5, 1]}
    assert listener.reasons == {0: FinishReason.STOP}
    usage = listener.updates[-1].usage
    assert usage is not None
    assert usage.drafted_tokens > 0
    assert usage.completion_tokens == 3
    _check(ring)


async def test_a_complete_grammar_ends_a_text_and_logprobs_stay_with_their_tokens() -> None:
    places = [PlaceLogprobs((7, -0.5)), PlaceLogprobs((8, -1.0))]

    async def compute(batch: Batch, _ids: TokenIds) -> None:
        await _turns(3)
        batch.sampled = []
        for meta in batch.sequences:
            assert meta.decode is not None
            first = meta.decode.begin is not None
            batch.sampled.append(
                SampledTokens(
                    meta.decode.sequence_id,
                    ids(7) if first else ids(8),
                    [places[0] if first else places[1]],
                    complete=not first,
                )
            )

    head = GenerationHead(settings(), compute=compute, send=None)
    head.pipeline_up(8, 4)
    listener = Listener()
    head.submit("r", GenerationRequest(ids(1), max_tokens=50), listener)
    await _finish(listener)
    assert listener.texts == {0: [7, 8]}
    assert listener.reasons == {0: FinishReason.STOP}
    assert [delta.logprobs for update in listener.updates for delta in update.deltas] == [
        [places[0]],
        [places[1]],
    ]


async def test_a_text_ends_where_the_context_or_the_kv_cache_does() -> None:
    for context, blocks in ((30, 64), (200, 5)):
        ring = Ring(settings(context=context), _MODEL, blocks=blocks, block_tokens=4)
        listeners = [Listener(), Listener()]
        request = GenerationRequest(ids(1, 2, 3))
        for listener in listeners:
            ring.head.submit("r", request, listener)
        await _finish(*listeners)
        for listener in listeners:
            assert _is_reference(listener, request, min(context, 4 * blocks + 1))
        _check(ring)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest(ids()), "empty"),
        (GenerationRequest(ids(1, 50)), "from 0 to 49"),
        (GenerationRequest(ids(-1)), "from 0 to 49"),
        (GenerationRequest(ids(*[1] * 200)), "context has room for 200"),
        (GenerationRequest(ids(*[1] * 100)), "KV cache has room for 100"),
        (GenerationRequest(ids(1).astype("int64")), "int32"),
        (GenerationRequest(ids(1), n=0), "n must be"),
        (GenerationRequest(ids(1), max_tokens=-1), "max_tokens"),
        (GenerationRequest(ids(1), draft_tokens=-1), "draft_tokens"),
        (GenerationRequest(ids(1), SamplingParams(temperature=float("nan"))), "temperature"),
        (GenerationRequest(ids(1), SamplingParams(top_p=0.0)), "top_p"),
        (GenerationRequest(ids(1), SamplingParams(logit_bias={50: 1.0})), "logit_bias"),
    ],
)
async def test_what_can_never_be_served_is_refused(
    request_: GenerationRequest, message: str
) -> None:
    ring = Ring(settings(), _MODEL, blocks=25, block_tokens=4)
    with pytest.raises(InvalidRequestError, match=message):
        ring.head.submit("r", request_, Listener())
    _check(ring)


async def test_a_full_queue_takes_all_of_a_request_or_nothing() -> None:
    ring = Ring(settings(queue_sequences=4), _MODEL, blocks=64, block_tokens=4)
    taken, refused = Listener(), Listener()
    request = GenerationRequest(ids(1, 2), max_tokens=4, n=3)
    ring.head.submit("r", request, taken)
    with pytest.raises(QueueFullError, match="try again later"):
        ring.head.submit("r", replace(request, n=2), refused)
    assert ring.head.queued == 3
    await _finish(taken)
    assert _is_reference(taken, request)
    _check(ring)


# -- sharing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 3])
async def test_a_document_that_many_share_is_computed_once(stages: int) -> None:
    ring = Ring(settings(stages=stages), _MODEL, blocks=400, block_tokens=4)
    document = [token % 50 for token in range(100)]
    requests = [GenerationRequest(ids(*document, n % 50, n % 7), max_tokens=4) for n in range(64)]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        ring.head.submit("r", request, listener)
    await _finish(*listeners)
    assert all(map(_is_reference, listeners, requests))
    # The document, its tail and the tokens but the last of each text.
    assert sum(batch.tokens for batch in ring.batches) <= 100 + 64 * (2 + 4 + 3)
    shared = [listener.updates[-1].usage for listener in listeners]
    assert sorted(usage.cached_tokens for usage in shared if usage) == [0] + [100] * 63
    _check(ring)


async def test_a_second_turn_finds_the_first_ones_text() -> None:
    ring = Ring(settings(), _MODEL, blocks=64, block_tokens=4)
    first, second = Listener(), Listener()
    ring.head.submit("r", GenerationRequest(ids(1, 2, 3, 4, 5), max_tokens=20), first)
    await _finish(first)
    prompt = [1, 2, 3, 4, 5, *first.texts[0], 9, 9]
    ring.head.submit("r", GenerationRequest(ids(*prompt), max_tokens=3), second)
    await _finish(second)
    usage = second.updates[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 24
    _check(ring)


# -- batches -----------------------------------------------------------------------------------


async def test_with_one_stage_all_texts_share_each_batch() -> None:
    ring = Ring(settings(), _MODEL, blocks=200, block_tokens=4)
    listeners = [Listener() for _ in range(12)]
    for listener in listeners:
        ring.head.submit("r", GenerationRequest(ids(1, 2), max_tokens=30), listener)
        await asyncio.sleep(0)
    await _finish(*listeners)
    # All arrive within the first steps, and then go together.
    assert len(ring.batches) < 45
    _check(ring)


async def test_texts_are_spread_over_the_stages() -> None:
    ring = Ring(settings(stages=3), _MODEL, blocks=200, block_tokens=4)
    listeners = [Listener() for _ in range(12)]
    for number, listener in enumerate(listeners):
        ring.head.submit("r", GenerationRequest(ids(number, 2), max_tokens=30), listener)
    await _finish(*listeners)
    sizes = [len(batch.sequences) for batch in ring.batches[10:-10]]
    assert set(sizes) == {4}
    assert max(batch.in_flight for batch in ring.batches) <= 4
    _check(ring)


async def test_a_long_prompt_does_not_stop_the_others() -> None:
    ring = Ring(settings(chunk_tokens=16), _MODEL, blocks=200, block_tokens=4)
    writing, reading, late = Listener(), Listener(), Listener()
    ring.head.submit("r", GenerationRequest(ids(1), max_tokens=60), writing)
    await _turns(20)
    assert writing.texts
    begin = len(ring.batches)
    ring.head.submit("r", GenerationRequest(ids(*[3] * 150), max_tokens=2), reading)
    ring.head.submit("r", GenerationRequest(ids(4, 5, 6), max_tokens=2), late)
    await _finish(writing, reading, late)
    during = [b for b in ring.batches[begin:] if any(m.length > 1 for m in b.sequences)]
    assert len(during) >= 150 / 16
    for batch in during:
        assert 1 in batch.lengths
        assert batch.tokens <= 16 + 2
    # And a short prompt does not wait for the long one.
    assert [listener.done.is_set() for listener in (late, reading)]
    order = [meta.request_id for batch in ring.batches for meta in batch.sequences]
    assert order.index("r#3") < len(order) - order[::-1].index("r#2")
    _check(ring)


async def test_batches_are_sent_in_order_one_at_a_time() -> None:
    log: list[str] = []

    async def compute(batch: Batch, _ids: TokenIds) -> None:
        # The later, the sooner done: as where results of a thread are noticed out of turn.
        await _turns(10 - 3 * batch.batch_id)

    async def send(batch: Batch) -> None:
        log.append(f"begin {batch.batch_id}")
        await _turns(5)
        log.append(f"end {batch.batch_id}")

    head = GenerationHead(settings(stages=2, batch_tokens=8), compute=compute, send=send)
    head.pipeline_up(8, 4)
    head.submit("r", GenerationRequest(ids(*range(24))), Listener())
    await _turns(50)
    assert log == [f"{what} {batch}" for batch in (1, 2, 3) for what in ("begin", "end")]


# -- trouble -----------------------------------------------------------------------------------


async def test_cancelling_frees_blocks_at_once_and_tells_the_stages() -> None:
    ring = Ring(settings(stages=2), _MODEL, blocks=64, block_tokens=4)
    stays, goes = Listener(), Listener()
    request = GenerationRequest(ids(*range(20)), max_tokens=60)
    ring.head.submit("r", request, stays)
    handle = ring.head.submit("r", GenerationRequest(ids(*range(30, 50)), max_tokens=60), goes)
    await _turns(40)
    assert goes.texts
    used = ring.head.scheduler.tables.used
    handle.cancel()
    assert ring.head.scheduler.tables.used <= used - 5
    seen = len(goes.updates)
    await _finish(stays)
    assert len(goes.updates) == seen
    assert not goes.done.is_set()
    assert _is_reference(stays, request)
    assert len(ring.ended) == 1
    handle.cancel()
    _check(ring)


async def test_the_one_request_that_cannot_be_computed_fails_alone() -> None:
    def fail(stage: int, batch: Batch) -> bool:
        return stage == 1 and any(
            meta.request_id.startswith("poison")
            and meta.decode
            and meta.decode.start + meta.length > 8
            for meta in batch.sequences
        )

    ring = Ring(settings(stages=2, micro_batches=1), _MODEL, blocks=64, block_tokens=4, fail=fail)
    requests = [GenerationRequest(ids(n, 7, 8), max_tokens=20) for n in range(5)]
    listeners = [Listener() for _ in requests]
    for number, (request, listener) in enumerate(zip(requests, listeners, strict=True)):
        ring.head.submit("poison" if number == 2 else "good", request, listener)
    await _finish(*listeners)
    assert isinstance(listeners.pop(2).error, ComputeError)
    requests.pop(2)
    assert all(map(_is_reference, listeners, requests))
    _check(ring)


async def test_results_that_do_not_fit_are_an_error_not_a_text() -> None:
    async def compute(batch: Batch, _ids: TokenIds) -> None:
        batch.sampled = [SampledTokens(99, ids(1))]

    head = GenerationHead(settings(), compute=compute, send=None)
    head.pipeline_up(8, 4)
    listener = Listener()
    head.submit("r", GenerationRequest(ids(1)), listener)
    await _finish(listener)
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
        await _finish(listener)
        assert isinstance(listener.error, ComputeError)
        assert head.scheduler.idle


async def test_after_a_break_texts_go_on_where_they_were() -> None:
    ring = Ring(settings(stages=3, draft_tokens=4), _MODEL, blocks=64, block_tokens=4)
    requests = [GenerationRequest(ids(n, 7, 8), max_tokens=40) for n in range(6)]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        ring.head.submit("r", request, listener)
    await _turns(60)
    assert all(listener.texts for listener in listeners)
    assert not any(listener.done.is_set() for listener in listeners)
    ring.down()
    assert not ring.head.ready
    assert ring.head.queued == 6
    late = Listener()
    ring.head.submit("r", requests[0], late)
    await _turns(5)
    ring.up()
    await _finish(*listeners, late)
    assert all(map(_is_reference, [*listeners, late], [*requests, requests[0]]))
    _check(ring)


async def test_a_pipeline_that_breaks_again_and_again_is_given_up() -> None:
    ring = Ring(settings(stages=2, max_attempts=2), _MODEL, blocks=64, block_tokens=4)
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(1)), listener)
    for _ in range(2):
        await _turns(10)
        ring.down()
        ring.up()
    await _finish(listener)
    assert isinstance(listener.error, PipelineUnavailableError)
    assert "broke 2 times" in str(listener.error)
    _check(ring)


async def test_requests_wait_for_a_pipeline_only_so_long() -> None:
    ring = Ring(settings(grace=0.05), _MODEL, blocks=64, block_tokens=4)
    ring.head.pipeline_down("cut")
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(1)), listener)
    await _finish(listener)
    assert isinstance(listener.error, PipelineUnavailableError)
    with pytest.raises(PipelineUnavailableError, match="cut"):
        ring.head.submit("r", GenerationRequest(ids(1)), Listener())
    _check(ring)


async def test_a_pipeline_that_comes_back_smaller_keeps_what_fits() -> None:
    ring = Ring(settings(), _MODEL, blocks=64, block_tokens=4)
    small, large, long = Listener(), Listener(), Listener()
    ring.head.submit("r", GenerationRequest(ids(1), max_tokens=30), small)
    ring.head.submit("r", GenerationRequest(ids(2), max_tokens=100), long)
    ring.head.submit("r", GenerationRequest(ids(*[3] * 50), max_tokens=90), large)
    await _turns(25)
    ring.down()
    assert len(long.texts[0]) < 35
    ring.blocks, ring.block_tokens = 6, 6
    ring.up()
    await _finish(small, large, long)
    assert _is_reference(small, GenerationRequest(ids(1), max_tokens=30))
    assert _is_reference(long, GenerationRequest(ids(2)), 37)
    assert isinstance(large.error, InvalidRequestError)
    _check(ring)


async def test_a_deadline_ends_a_request() -> None:
    async def slow(_stage: int, _batch: Batch) -> None:
        await asyncio.sleep(0.01)

    ring = Ring(settings(), _MODEL, blocks=64, block_tokens=4, pause=slow)
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(1)), listener, deadline=time.monotonic() + 0.3)
    with pytest.raises(DeadlineError):
        ring.head.submit("r", GenerationRequest(ids(1)), listener, deadline=time.monotonic())
    await _finish(listener)
    assert isinstance(listener.error, DeadlineError)
    assert listener.texts
    await asyncio.sleep(0.05)
    _check(ring)


async def test_a_sink_with_a_defect_hurts_no_other() -> None:
    ring = Ring(settings(), _MODEL, blocks=64, block_tokens=4)

    def defect(_: GenerationUpdate | Exception) -> None:
        raise RuntimeError("a defect")

    listener = Listener()
    request = GenerationRequest(ids(1), max_tokens=10)
    ring.head.submit("r", request, defect)
    ring.head.submit("r", request, listener)
    await _finish(listener)
    assert _is_reference(listener, request)
    _check(ring)


async def test_the_iterator_yields_and_closing_it_cancels() -> None:
    ring = Ring(settings(), _MODEL, blocks=64, block_tokens=4)
    request = GenerationRequest(ids(1, 2), max_tokens=12)
    written: list[int] = []
    async for update in ring.head.generate("r", request):
        for delta in update.deltas:
            written.extend(delta.token_ids.tolist())
    assert written == reference(_MODEL, request, 0, 200)[0]
    updates = ring.head.generate("r", replace(request, max_tokens=0))
    await anext(updates)
    await updates.aclose()  # type: ignore[attr-defined]
    assert ring.head.open_requests == 0
    await _turns(5)
    _check(ring)


async def test_draining_waits_for_what_is_open() -> None:
    ring = Ring(settings(), _MODEL, blocks=64, block_tokens=4)
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(1), max_tokens=10), listener)
    await ring.head.drain(5.0)
    assert listener.done.is_set()
    ring.head.pipeline_down("cut")
    ring.head.submit("r", GenerationRequest(ids(1), max_tokens=10), Listener())
    begin = time.monotonic()
    await ring.head.drain(0.05)
    assert time.monotonic() - begin < 2.0
    assert ring.head.open_requests == 1
    ring.close()


async def test_metrics_tell_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    ring = Ring(settings(draft_tokens=4), copying(3), blocks=64, block_tokens=4)
    listener = Listener()
    ring.head.submit("r", GenerationRequest(ids(*[1, 2, 3] * 5), max_tokens=30), listener)
    await _finish(listener)
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
    _check(ring)
