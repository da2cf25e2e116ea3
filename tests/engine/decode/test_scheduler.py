"""Which texts run next: shares, chunks, who waits, who gives way, how far is guessed ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miaotui.engine.decode.flight import load
from miaotui.engine.decode.requests import OpenRequest
from miaotui.engine.decode.scheduler import DecodeScheduler, Plan
from miaotui.engine.decode.sequence import State, Text
from miaotui.engine.decode.types import GenerationRequest, GenerationUsage, TokenIds
from miaotui.engine.scheduler import QueueFullError
from tests.engine.decode.ring import ids, settings


class Bench:
    """A scheduler whose batches come back when the test says so."""

    def __init__(self, blocks: int = 100, block_tokens: int = 4, **bounds: Any) -> None:
        self.scheduler = DecodeScheduler(settings(**bounds))
        self.scheduler.configure(blocks, block_tokens)
        self.flights: list[Plan] = []
        self.texts: list[Text] = []

    def add(self, *prompt: int, n: int = 1, draft_tokens: int = 0, **more: Any) -> list[Text]:
        request = GenerationRequest(ids(*prompt), n=n, draft_tokens=draft_tokens, **more)
        work = OpenRequest(
            key=f"{len(self.texts)}",
            request=request,
            trace={},
            arrived=0.0,
            usage=GenerationUsage(),
            sink=lambda _: None,
        )
        texts = work.add_texts(len(self.texts), 0)
        work.bound(200, self.scheduler.tables.capacity)
        self.scheduler.add(texts)
        self.texts.extend(texts)
        return texts

    def plan(self) -> list[tuple[int, int]]:
        """The next batch, as text and number of tokens."""
        plan = self.scheduler.plan(
            in_flight=len(self.flights), decoding=sum(plan.decodes for plan in self.flights)
        )
        if plan is None:
            return []
        self.flights.append(plan)
        return [(item.text.order, item.length) for item in plan.slices]

    def land(self, *tokens: int) -> None:
        """The oldest batch comes back; `tokens` (else 7) are written."""
        for item in self.flights.pop(0).slices:
            if item.live:
                written: TokenIds = ids(*(tokens or (7,))) if item.samples else ids()
                self.scheduler.advance(item, written, max(len(written) - 1, 0))

    def drain(self) -> None:
        """Writes a token for everything that is in flight."""
        while self.flights:
            self.land()


def test_the_first_come_is_the_first_served_and_short_prompts_share_a_batch() -> None:
    bench = Bench(batch_tokens=64)
    for number, length in enumerate((5, 3, 9)):
        bench.add(number, *range(1, length))
    assert bench.plan() == [(0, 5), (1, 3), (2, 9)]


def test_a_prompt_is_cut_into_chunks_that_follow_each_other() -> None:
    bench = Bench(batch_tokens=16, chunk_tokens=16, stages=3)
    bench.add(*range(40))
    assert [bench.plan() for _ in range(4)] == [[(0, 16)], [(0, 16)], [(0, 8)], []]
    starts = [item.start for plan in bench.flights for item in plan.slices]
    samples = [item.samples for plan in bench.flights for item in plan.slices]
    assert starts == [0, 16, 32]
    assert samples == [0, 0, 1]
    bench.drain()
    assert bench.plan() == [(0, 1)]


def test_what_waits_is_spread_over_the_stages() -> None:
    bench = Bench(batch_tokens=90, chunk_tokens=4, stages=3)
    bench.add(*range(48))
    assert [bench.plan() for _ in range(3)] == [[(0, 16)], [(0, 11)], [(0, 7)]]


def test_a_long_prompt_leaves_half_to_those_behind_it() -> None:
    bench = Bench(batch_tokens=32, chunk_tokens=32)
    bench.add(*range(100))
    bench.add(*range(100, 106))
    bench.add(*range(50, 150))
    # The second needs six only, and the third gets half of what is left.
    assert bench.plan() == [(0, 16), (1, 6), (2, 10)]


def test_prompts_take_little_of_a_batch_while_texts_are_written() -> None:
    bench = Bench(batch_tokens=64, chunk_tokens=8)
    bench.add(1, 2)
    bench.plan()
    bench.drain()
    bench.add(*range(30))
    assert bench.plan() == [(0, 1), (1, 8)]
    # Every stage has work: the prompt waits for the text's next token.
    assert bench.plan() == []
    bench.drain()
    assert bench.plan() == [(0, 1), (1, 8)]


def test_ready_texts_are_spread_over_as_many_batches_as_wanted() -> None:
    for micro_batches, batches in ((0, [3, 2, 2]), (1, [7]), (2, [4, 3])):
        bench = Bench(stages=3, micro_batches=micro_batches, chunk_tokens=64)
        for _ in range(7):
            bench.add(1, 2, 3)
        assert len(bench.plan()) == 7
        bench.drain()
        planned = []
        while plan := bench.plan():
            planned.append(len(plan))
        assert planned == batches


def test_texts_that_begin_alike_wait_for_the_first_of_them() -> None:
    bench = Bench(batch_tokens=16, chunk_tokens=16, stages=3)
    document = list(range(20))
    bench.add(*document, 30, n=2)
    bench.add(*document, 31)
    bench.add(40, 41)
    assert bench.plan() == [(0, 14), (3, 2)]
    first, alike, cousin, stranger = bench.texts
    assert stranger.state is State.FLYING
    assert alike.state is cousin.state is State.WAITING
    while first.state is State.PREFILL:
        bench.plan()
    assert alike.state is cousin.state is State.WAITING
    bench.drain()
    bench.plan()
    assert {item.text: item.start for item in bench.flights[-1].slices if item.first} == {
        alike: 20,
        cousin: 20,
    }


def test_a_small_beginning_is_not_worth_a_wait() -> None:
    bench = Bench(batch_tokens=64)
    bench.add(1, 2, 3, 4, 5)
    bench.add(1, 2, 3, 4, *range(10, 30))
    assert bench.plan() == [(0, 5), (1, 24)]


@pytest.mark.parametrize("how", ["release", "reset", "preempt"])
def test_those_that_wait_for_one_that_leaves_wait_no_longer(how: str) -> None:
    bench = Bench(batch_tokens=8, chunk_tokens=8, stages=3)
    first, second = bench.add(*range(30), n=2)
    bench.plan()
    assert second.state is State.WAITING
    if how == "release":
        bench.scheduler.release(first)
    elif how == "reset":
        bench.scheduler.reset()
        bench.flights.clear()
        bench.scheduler.release(first)
    else:
        bench.scheduler._preempt()
        bench.scheduler.release(first)
    assert bench.plan() == [(1, 8)]
    assert bench.scheduler.released == [1]


def test_a_block_is_shared_only_once_its_batch_is_back() -> None:
    bench = Bench(batch_tokens=64)
    (first,) = bench.add(*range(13))
    bench.plan()
    tables = bench.scheduler.tables
    assert tables.pool is not None
    assert tables.pool.find(first.digests, 3) == []
    bench.drain()
    assert len(tables.pool.find(first.digests, 3)) == 3


def test_a_block_of_a_text_that_left_meanwhile_is_not_shared() -> None:
    bench = Bench(batch_tokens=64)
    (first,) = bench.add(*range(13))
    bench.plan()
    digests = list(first.digests)
    bench.scheduler.release(first)
    bench.drain()
    tables = bench.scheduler.tables
    assert tables.pool is not None
    assert tables.pool.find(digests, 3) == []
    assert bench.scheduler.idle


def test_the_latest_gives_way_and_comes_back_with_what_it_wrote() -> None:
    bench = Bench(blocks=6, block_tokens=2, prefix_cache=False)
    early, late = bench.add(1)[0], bench.add(2)[0]
    for _ in range(20):
        if not bench.plan():
            break
        bench.drain()
        if bench.scheduler.preemptions:
            break
    assert late.state is State.WAITING
    assert late.work.usage.preemptions == 1
    assert early.state in (State.READY, State.FLYING)
    written = late.length
    assert written > 4
    bench.scheduler.release(early)
    assert bench.plan() == [(1, written)]
    (item,) = bench.flights[-1].slices
    start = item.text.start()
    assert start.written.tolist() == [7] * (written - 1)
    assert item.first
    assert item.sequence_id == 3


def test_who_gives_way_is_in_no_batch_however_long_it_was_ready() -> None:
    bench = Bench(blocks=5, block_tokens=2, prefix_cache=False)
    early, late = bench.add(1, 2, 3)[0], bench.add(4, 5, 6)[0]
    bench.plan()
    bench.drain()
    for _ in range(2):
        bench.scheduler._ready.move_to_end(early)
        assert bench.plan() == ([(0, 1), (1, 1)] if early.length == 4 else [(0, 1)])
        bench.drain()
    assert late.state is State.WAITING


def test_something_always_runs_even_after_all_that_were_ready_gave_way() -> None:
    bench = Bench(blocks=6, block_tokens=1, batch_tokens=1, chunk_tokens=1, max_in_flight=3)
    early, late = bench.add(1)[0], bench.add(2, 3)[0]
    while not bench.scheduler.preemptions:
        while bench.plan():
            pass
        bench.land()
    assert late.state is State.WAITING
    assert early.length < 6
    assert bench.flights or bench.plan()


def test_nobody_is_let_in_where_the_running_could_not_grow() -> None:
    bench = Bench(blocks=4, block_tokens=4, prefix_cache=False)
    bench.add(*range(8))
    bench.add(*range(8))
    bench.plan()
    bench.drain()
    # Two blocks are free, as many as the second needs; the first will need one soon.
    assert bench.plan() == [(0, 1)]
    assert bench.texts[1].state is State.WAITING


def test_the_first_that_waits_is_not_overtaken_by_smaller_ones() -> None:
    bench = Bench(blocks=6, block_tokens=4, prefix_cache=False)
    bench.add(*range(12))
    bench.add(*range(16))
    bench.add(1)
    bench.plan()
    assert [text.state for text in bench.texts] == [State.FLYING, State.WAITING, State.WAITING]
    bench.scheduler.release(bench.texts[0])
    assert bench.plan() == [(1, 16), (2, 1)]


def test_drafts_share_what_a_batch_has_to_spare() -> None:
    bench = Bench(batch_tokens=200, draft_batch_tokens=12, prefix_cache=False)
    loop = [1, 2, 3, 4, 5, 6, 7] * 2
    for _ in range(4):
        bench.add(*loop, 1, 2, draft_tokens=8)
    bench.add(50, 51, 52, 53)
    bench.plan()
    bench.land(3)
    # Five tokens and seven guesses; the stranger has none.
    lengths = dict(bench.plan())
    assert lengths[4] == 1
    assert sum(lengths.values()) == 12
    assert max(lengths.values()) - min(lengths[n] for n in range(4)) == 1
    drafts = [item.draft.tolist() for item in bench.flights[-1].slices[:4]]
    assert all(draft == [4, 5, 6, 7][: len(draft)] for draft in drafts)


def test_no_text_gives_way_for_a_guess() -> None:
    bench = Bench(blocks=9, block_tokens=4, prefix_cache=False)
    bench.add(*[1, 2, 3, 4] * 3, 1, 2, 3, draft_tokens=8)
    bench.add(*[1, 2, 3, 4] * 3, 1, 2, 3, draft_tokens=8)
    bench.plan()
    bench.land(4)
    # Each has one token to come in a block that is full then, and one block is free.
    assert bench.plan() == [(0, 1), (1, 1)]
    assert bench.scheduler.preemptions == 0


def test_suspects_are_computed_alone_before_anything_else() -> None:
    bench = Bench(stages=2, prefix_cache=False)
    for number in range(3):
        bench.add(number, 1, 2)
    bench.plan()
    bench.drain()
    first, second, third = bench.texts
    bench.scheduler.reset([second, third])
    assert bench.plan() == [(1, 4)]
    assert bench.plan() == []
    bench.drain()
    bench.scheduler.release(third)
    assert {order for order, _ in bench.plan()} == {0, 1}
    assert first.state is State.FLYING


def test_a_suspect_gets_room_whoever_must_give_way() -> None:
    bench = Bench(blocks=4, block_tokens=4, prefix_cache=False)
    early, late = bench.add(*range(9))[0], bench.add(*range(9))[0]
    bench.plan()
    bench.drain()
    bench.scheduler.reset([early, late])
    assert bench.plan() == [(0, 10)]
    bench.drain()
    assert bench.plan() == [(1, 9)]
    assert early.state is State.WAITING


def test_the_queue_has_bounds() -> None:
    bench = Bench(queue_sequences=3, queue_tokens=10)
    bench.add(*range(40))
    with pytest.raises(QueueFullError):
        bench.add(1)
    bench.plan()
    bench.add(1, n=3)
    with pytest.raises(QueueFullError):
        bench.add(1)
    assert len(bench.scheduler.waiting) == 3


def test_sources_take_blocks_and_room_in_batches_and_queue() -> None:
    """An encoder's 10 rows count as tokens do: 3 blocks of 4, and 10 of a batch's tokens."""
    bench = Bench(blocks=9, batch_tokens=12, source_shape=(2, 5), source_rows=10, queue_tokens=40)
    tables = bench.scheduler.tables
    assert tables.capacity == (9 - 3) * 4
    source = np.zeros((2, 5), np.float32)
    first, second = (bench.add(1, 2, 3, source=source)[0] for _ in range(2))
    assert bench.scheduler.waiting.tokens == 26
    with pytest.raises(QueueFullError):
        bench.add(*range(5), source=source)
    assert bench.plan() == [(0, 3)]  # alone: the source fills the batch
    batch, input_ids = load(1, bench.flights[-1], tables)
    item = batch.sequences[0].decode
    assert item is not None
    assert item.begin is not None
    assert item.begin.source is source
    assert (len(item.blocks), item.tokens.tolist()) == (4, input_ids.tolist())
    bench.land()
    assert bench.plan() == [(0, 1), (1, 3)]
    batch, _ = load(2, bench.flights[-1], tables)
    known, new = (meta.decode for meta in batch.sequences)
    assert known is not None
    assert new is not None
    assert known.begin is None
    assert (len(known.blocks), known.tokens.tolist()) == (4, [7])
    assert not set(known.blocks.tolist()) & set(new.blocks.tolist())
    assert tables.used == 8
    bench.land()
    bench.plan()
    # The ninth block goes to the earlier; the later gives all of its own up for the next.
    for _ in range(8):
        bench.land()
        bench.plan()
    assert (first.state, second.state) == (State.FLYING, State.WAITING)
    for text in (first, second):
        bench.scheduler.release(text)
    assert tables.used == 0
