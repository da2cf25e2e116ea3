"""The head of a decoder's pipeline over stages that check what they are sent."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from miaotui.engine.batch import Batch
from miaotui.engine.decode.head import GenerationHead
from miaotui.engine.decode.types import (
    FinishReason,
    GenerationRequest,
    PlaceLogprobs,
    SampledTokens,
    SamplingParams,
    TokenIds,
)
from miaotui.engine.decode.validation import InvalidRequestError
from miaotui.engine.scheduler import QueueFullError
from tests.engine.decode.ring import (
    MODEL,
    Listener,
    Ring,
    check,
    copying,
    finish,
    ids,
    is_reference,
    settings,
    turns,
)

# -- texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_texts_are_what_the_model_writes(stages: int) -> None:
    ring = Ring(settings(stages=stages), MODEL, blocks=64, block_tokens=4)
    requests = [
        GenerationRequest(ids(*range(1, 2 + 5 * n)), max_tokens=3 + n, n=1 + n % 2)
        for n in range(8)
    ]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        ring.head.submit("r", request, listener)
        await asyncio.sleep(0)
    await finish(*listeners)
    for request, listener in zip(requests, listeners, strict=True):
        assert is_reference(listener, request)
        usage = listener.updates[-1].usage
        assert usage is not None
        assert usage.prompt_tokens == len(request.prompt)
        assert usage.completion_tokens == request.n * request.max_tokens
    check(ring)


async def test_the_same_seed_gives_the_same_text_and_texts_of_a_request_differ() -> None:
    ring = Ring(settings(), MODEL, blocks=64, block_tokens=4)
    first, second = Listener(), Listener()
    request = GenerationRequest(ids(1, 2, 3), SamplingParams(seed=2**64 - 1), 8, n=2)
    ring.head.submit("a", request, first)
    ring.head.submit("b", replace(request, sampling=SamplingParams(seed=0), n=1), second)
    await finish(first, second)
    assert first.texts[0] != first.texts[1] == second.texts[0]
    check(ring)


async def test_a_stop_token_is_the_last_one_even_amid_a_draft() -> None:
    ring = Ring(settings(draft_tokens=8), copying(5), blocks=64, block_tokens=4)
    listener = Listener()
    request = GenerationRequest(
        ids(1, 2, 3, 4, 5, 1, 2, 3), stop_token_ids=frozenset([1]), max_tokens=50
    )
    ring.head.submit("r", request, listener)
    await finish(listener)
    assert listener.texts == {0: [4, 5, 1]}
    assert listener.reasons == {0: FinishReason.STOP}
    usage = listener.updates[-1].usage
    assert usage is not None
    assert usage.drafted_tokens > 0
    assert usage.completion_tokens == 3
    check(ring)


async def test_a_complete_grammar_ends_a_text_and_logprobs_stay_with_their_tokens() -> None:
    places = [PlaceLogprobs((7, -0.5)), PlaceLogprobs((8, -1.0))]

    async def compute(batch: Batch, _ids: TokenIds) -> None:
        await turns(3)
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
    await finish(listener)
    assert listener.texts == {0: [7, 8]}
    assert listener.reasons == {0: FinishReason.STOP}
    assert [delta.logprobs for update in listener.updates for delta in update.deltas] == [
        [places[0]],
        [places[1]],
    ]


async def test_a_text_ends_where_the_context_or_the_kv_cache_does() -> None:
    for context, blocks in ((30, 64), (200, 5)):
        ring = Ring(settings(context=context), MODEL, blocks=blocks, block_tokens=4)
        listeners = [Listener(), Listener()]
        request = GenerationRequest(ids(1, 2, 3))
        for listener in listeners:
            ring.head.submit("r", request, listener)
        await finish(*listeners)
        for listener in listeners:
            assert is_reference(listener, request, min(context, 4 * blocks + 1))
        check(ring)


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
    ring = Ring(settings(), MODEL, blocks=25, block_tokens=4)
    with pytest.raises(InvalidRequestError, match=message):
        ring.head.submit("r", request_, Listener())
    check(ring)


async def test_a_full_queue_takes_all_of_a_request_or_nothing() -> None:
    ring = Ring(settings(queue_sequences=4), MODEL, blocks=64, block_tokens=4)
    taken, refused = Listener(), Listener()
    request = GenerationRequest(ids(1, 2), max_tokens=4, n=3)
    ring.head.submit("r", request, taken)
    with pytest.raises(QueueFullError, match="try again later"):
        ring.head.submit("r", replace(request, n=2), refused)
    assert ring.head.queued == 3
    await finish(taken)
    assert is_reference(taken, request)
    check(ring)


# -- sharing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 3])
async def test_a_document_that_many_share_is_computed_once(stages: int) -> None:
    ring = Ring(settings(stages=stages), MODEL, blocks=400, block_tokens=4)
    document = [token % 50 for token in range(100)]
    requests = [GenerationRequest(ids(*document, n % 50, n % 7), max_tokens=4) for n in range(64)]
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        ring.head.submit("r", request, listener)
    await finish(*listeners)
    assert all(map(is_reference, listeners, requests))
    # The document, its tail and the tokens but the last of each text.
    assert sum(batch.tokens for batch in ring.batches) <= 100 + 64 * (2 + 4 + 3)
    shared = [listener.updates[-1].usage for listener in listeners]
    assert sorted(usage.cached_tokens for usage in shared if usage) == [0] + [100] * 63
    check(ring)


async def test_prompts_of_different_salts_share_nothing() -> None:
    ring = Ring(settings(), MODEL, blocks=400, block_tokens=4)
    document = [token % 50 for token in range(100)]
    cached = []
    for salt in (b"", b"one tenant", b"another", b"one tenant", b""):
        request = GenerationRequest(ids(*document, 1), max_tokens=2, cache_salt=salt)
        listener = Listener()
        ring.head.submit("r", request, listener)
        await finish(listener)
        assert is_reference(listener, request)
        usage = listener.updates[-1].usage
        assert usage is not None
        cached.append(usage.cached_tokens)
    assert cached == [0, 0, 0, 100, 100]
    check(ring)


async def test_a_second_turn_finds_the_first_ones_text() -> None:
    ring = Ring(settings(), MODEL, blocks=64, block_tokens=4)
    first, second = Listener(), Listener()
    ring.head.submit("r", GenerationRequest(ids(1, 2, 3, 4, 5), max_tokens=20), first)
    await finish(first)
    prompt = [1, 2, 3, 4, 5, *first.texts[0], 9, 9]
    ring.head.submit("r", GenerationRequest(ids(*prompt), max_tokens=3), second)
    await finish(second)
    usage = second.updates[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 24
    check(ring)


# -- batches -----------------------------------------------------------------------------------


async def test_with_one_stage_all_texts_share_each_batch() -> None:
    ring = Ring(settings(), MODEL, blocks=200, block_tokens=4)
    listeners = [Listener() for _ in range(12)]
    for listener in listeners:
        ring.head.submit("r", GenerationRequest(ids(1, 2), max_tokens=30), listener)
        await asyncio.sleep(0)
    await finish(*listeners)
    # All arrive within the first steps, and then go together.
    assert len(ring.batches) < 45
    check(ring)


async def test_texts_are_spread_over_the_stages() -> None:
    ring = Ring(settings(stages=3), MODEL, blocks=200, block_tokens=4)
    listeners = [Listener() for _ in range(12)]
    for number, listener in enumerate(listeners):
        ring.head.submit("r", GenerationRequest(ids(number, 2), max_tokens=30), listener)
    await finish(*listeners)
    sizes = [len(batch.sequences) for batch in ring.batches[10:-10]]
    assert set(sizes) == {4}
    assert max(batch.in_flight for batch in ring.batches) <= 4
    check(ring)


async def test_first_and_last_tokens_are_told_at_once_and_the_others_seldom() -> None:
    ring = Ring(settings(news_seconds=60.0), MODEL, blocks=200, block_tokens=4)
    first, second = Listener(), Listener()
    ring.head.submit("r", GenerationRequest(ids(1, 2), max_tokens=40), first)
    await turns(20)
    assert len(first.updates) == 1
    ring.head.submit("r", GenerationRequest(ids(2, 3), max_tokens=2), second)
    await finish(first, second)
    # The second's first token, its end, and the first's end: what is new goes along.
    assert len(first.updates) <= 4
    assert len(first.texts[0]) == 40
    check(ring)


async def test_a_long_prompt_does_not_stop_the_others() -> None:
    ring = Ring(settings(chunk_tokens=16), MODEL, blocks=200, block_tokens=4)
    writing, reading, late = Listener(), Listener(), Listener()
    ring.head.submit("r", GenerationRequest(ids(1), max_tokens=60), writing)
    await turns(20)
    assert writing.texts
    begin = len(ring.batches)
    ring.head.submit("r", GenerationRequest(ids(*[3] * 150), max_tokens=2), reading)
    ring.head.submit("r", GenerationRequest(ids(4, 5, 6), max_tokens=2), late)
    await finish(writing, reading, late)
    during = [b for b in ring.batches[begin:] if any(m.length > 1 for m in b.sequences)]
    assert len(during) >= 150 / 16
    for batch in during:
        assert 1 in batch.lengths
        assert batch.tokens <= 16 + 2
    # And a short prompt does not wait for the long one.
    assert [listener.done.is_set() for listener in (late, reading)]
    order = [meta.request_id for batch in ring.batches for meta in batch.sequences]
    assert order.index("r#3") < len(order) - order[::-1].index("r#2")
    check(ring)


async def test_batches_are_sent_in_order_one_at_a_time() -> None:
    log: list[str] = []

    async def compute(batch: Batch, _ids: TokenIds) -> None:
        # The later, the sooner done: as where results of a thread are noticed out of turn.
        await turns(10 - 3 * batch.batch_id)

    async def send(batch: Batch) -> None:
        log.append(f"begin {batch.batch_id}")
        await turns(5)
        log.append(f"end {batch.batch_id}")

    head = GenerationHead(settings(stages=2, batch_tokens=8), compute=compute, send=send)
    head.pipeline_up(8, 4)
    head.submit("r", GenerationRequest(ids(*range(24))), Listener())
    await turns(50)
    assert log == [f"{what} {batch}" for batch in (1, 2, 3) for what in ("begin", "end")]
