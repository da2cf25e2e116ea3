"""Which texts' tokens run next, and in which KV blocks.

Iteration-level batching after Orca (Yu et al., OSDI 2022): texts join and leave at every
step. Prompts are computed in chunks beside the others' tokens, after Sarathi-Serve (Agrawal
et al., OSDI 2024). What is ready is spread over as many batches as the pipeline has stages.
"""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from miaotui.engine.decode.sequence import NO_TOKENS, State, Text
from miaotui.engine.decode.settings import GenerationSettings
from miaotui.engine.decode.tables import BlockTables
from miaotui.engine.decode.types import TokenIds
from miaotui.engine.decode.waiting import WaitingTexts, by_order


@dataclass(slots=True)
class Slice:
    """A text's share of one batch."""

    text: Text
    sequence_id: int
    """The text's when this was planned; if it has another now, this is void."""
    start: int
    length: int
    """Tokens, the draft's included."""
    samples: int
    draft: TokenIds
    first: bool
    """Of its sequence."""

    @property
    def live(self) -> bool:
        """Whether its result counts."""
        return self.text.sequence_id == self.sequence_id


@dataclass(slots=True)
class Plan:
    """What one batch computes."""

    slices: list[Slice]
    decodes: bool
    """Whether it has the next tokens of texts that were being written already."""

    @property
    def tokens(self) -> int:
        """Of all slices."""
        return sum(item.length for item in self.slices)


class DecodeScheduler:
    """The texts that wait and run. The event loop owns it.

    Relies on every stage to compute batches in the order planned: blocks are given to others
    as soon as their text leaves, whatever of it is still on its way.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self.settings = settings
        self.waiting = WaitingTexts(
            max_texts=settings.queue_sequences,
            max_tokens=settings.queue_tokens,
            source_rows=settings.source_rows,
        )
        self.tables = BlockTables(sharing=settings.prefix_cache, source_rows=settings.source_rows)
        self.released: list[int] = []
        """Ids of sequences that have ended and that no batch has reported yet."""
        self.preemptions = 0
        self._ids = itertools.count(1)
        self._running: set[Text] = set()
        self._prefill: list[Text] = []
        self._ready: OrderedDict[Text, None] = OrderedDict()
        self._trials: deque[Text] = deque()

    @property
    def running(self) -> int:
        """Texts that hold KV blocks."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or holds a KV block."""
        left = self.waiting or self._running or self._prefill or self._ready
        return not left and self.tables.idle

    # -- coming and going ------------------------------------------------------------------

    def configure(self, blocks: int, block_tokens: int) -> None:
        """Says how large the KV cache is; nothing may run."""
        self.tables.configure(blocks, block_tokens, self.waiting)

    def add(self, texts: list[Text]) -> None:
        """Queues all of a request's texts, or none: then `QueueFullError`."""
        self.waiting.check(len(texts), sum(text.length for text in texts))
        for text in texts:
            self.waiting.add(text)

    def release(self, text: Text) -> None:
        """Ends a text, wherever it is; its blocks are free at once."""
        if text.state is State.WAITING:
            self.waiting.remove(text)
            text.state = State.DONE
        elif text.state is not State.DONE:
            self._leave(text, State.DONE)

    def reset(self, suspects: Iterable[Text] = ()) -> list[Text]:
        """Puts all that runs back in the queue, and forgets what the KV cache holds.

        Each of the `suspects` is then computed alone, until it has written a token, before
        anything else goes on.
        """
        texts = sorted(self._running, key=by_order)
        for text in texts:
            self._requeue(text)
        self.tables.clear()
        self._trials.extend(suspects)
        return texts

    def advance(self, item: Slice, written: TokenIds, accepted: int) -> None:
        """A live slice was computed by every stage.

        `written`: tokens that this adds to the text; `accepted`: so many of the draft's were
        right, whether or not they were added.
        """
        text = item.text
        if len(item.draft):
            text.drafter.learn(len(item.draft), accepted)
        text.tokens.extend(written)
        text.computed = min(item.start + item.length - len(item.draft) + accepted, text.length)
        if item.samples:
            text.sent = text.computed
            text.state = State.READY
            self._ready[text] = None
        self.waiting.wake(self.tables.publish(text))

    # -- planning ----------------------------------------------------------------------------

    def plan(self, *, in_flight: int, decoding: int) -> Plan | None:
        """The next batch, or None where nothing should be sent now.

        `in_flight`: batches in the pipeline; `decoding`: those of them with `Plan.decodes`.
        """
        settings = self.settings
        if self.tables.pool is None or in_flight >= settings.max_in_flight:
            return None
        while self._trials:
            text = self._trials[0]
            if text.state in (State.WAITING, State.PREFILL, State.FLYING):
                return None if in_flight else self._try(text)
            self._trials.popleft()
        while True:
            slices: list[Slice] = []
            preemptions = self.preemptions
            if self._ready and decoding < settings.groups:
                slices = self._decode(settings.groups - decoding)
            elif decoding and in_flight >= settings.stages:
                # Every stage has work, so prompts wait for company: one reading of the weights
                # serves them and the next tokens of the others.
                return None
            decodes = bool(slices)
            # Who has just made room must not take it again.
            self._fill(slices, admit=preemptions == self.preemptions)
            if slices:
                return Plan(slices, decodes)
            if preemptions == self.preemptions:
                return None
            # All that were ready gave way to others, which are not: now it is anyone's turn.

    def _try(self, text: Text) -> Plan:
        """A batch with a suspect alone; its next token has not come back yet."""
        if text.state is State.WAITING:
            shared, _ = self.tables.find(text)
            while not self._place(text, shared, spare=0):
                self._preempt()
                shared, _ = self.tables.find(text)
        return Plan([self._chunk(text, self.settings.batch_tokens, 0)], decodes=False)

    def _decode(self, batches: int) -> list[Slice]:
        """The next tokens of a share of the texts that are ready, for one of so many batches."""
        writing = len(self._running) - len(self._prefill)
        share = min(-(-writing // self.settings.groups), -(-len(self._ready) // batches))
        share = min(share, self.settings.batch_tokens)
        texts = [self._ready.popitem(last=False)[0] for _ in range(share)]
        # The earliest first: then whoever gives way to one comes after it.
        texts.sort(key=by_order)
        texts = [text for text in texts if text.state is State.READY and self._grow(text)]
        slices = []
        for text, draft in zip(texts, self._drafts(texts), strict=True):
            samples = 1 + len(draft)
            slices.append(Slice(text, text.sequence_id, text.sent, samples, samples, draft, False))
            text.state = State.FLYING
            text.sent += samples
        return slices

    def _drafts(self, texts: list[Text]) -> list[TokenIds]:
        """Guesses for a batch's texts, as many as cost it next to nothing."""
        settings = self.settings
        spare = min(settings.draft_batch_tokens, settings.batch_tokens) - len(texts)
        if spare < 1:
            return [NO_TOKENS] * len(texts)
        drafts = [text.draft() for text in texts]
        hopeful = sum(len(draft) > 0 for draft in drafts)
        for index, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            if not len(draft):
                continue
            share = min(-(-spare // hopeful), len(draft))
            hopeful -= 1
            # Nobody is to give way for a mere guess.
            if not self.tables.grow(text, text.length + share, spare=len(self._running)):
                held = text.table.size - self.tables.size(0)
                share = min(share, held * self.tables.block_tokens - text.length)
            drafts[index] = draft[:share]
            spare -= share
        return drafts

    def _grow(self, text: Text) -> bool:
        """Sees that there is a block for a text's newest token; False: it gave way itself."""
        while not self.tables.grow(text, text.length):
            if self._preempt() is text:
                return False
        return True

    def _preempt(self) -> Text:
        """Makes room: the latest has the least to lose, and so the earliest always gets on."""
        victim = max(self._running, key=by_order)
        victim.work.usage.preemptions += 1
        self.preemptions += 1
        self._requeue(victim)
        return victim

    def _fill(self, slices: list[Slice], *, admit: bool) -> None:
        """Adds parts of prompts, the earliest first."""
        settings = self.settings
        budget = settings.batch_tokens - sum(item.length for item in slices)
        unsent = sum(text.left for text in self._prefill)
        unsent += self.waiting.tokens - self.waiting.held_tokens
        if len(self._running) > len(self._prefill):
            budget = min(budget, settings.chunk_tokens)
        else:
            # No text is being written that this could delay: as much as keeps all stages busy.
            share = -(-unsent // settings.stages)
            budget = min(budget, max(share, settings.chunk_tokens))
        mine: list[Slice] = []
        for text in list(self._prefill):
            if budget > 0:
                unsent -= text.left
                mine.append(self._chunk(text, budget, unsent))
                budget -= mine[-1].length
        while admit and budget > 0 and len(self._running) < settings.max_running:
            admitted = self._admit()
            if admitted is None:
                break
            unsent -= admitted.length + settings.source_rows
            mine.append(self._chunk(admitted, budget, unsent))
            budget -= mine[-1].length + settings.source_rows
        for item in mine:
            # What was left to others, but they could not use.
            budget -= self._lengthen(item, budget)
        slices.extend(mine)

    def _chunk(self, text: Text, budget: int, others: int) -> Slice:
        """The next part of a prompt; `others`: tokens that wait behind it."""
        first = not text.sequence_id
        if first:
            text.sequence_id = next(self._ids)
        item = Slice(text, text.sequence_id, text.sent, 0, 0, NO_TOKENS, first)
        # A long prompt leaves half to those behind it, as far as they can use it.
        self._lengthen(item, max(budget - max(others, 0), -(-budget // 2)))
        return item

    def _lengthen(self, item: Slice, budget: int) -> int:
        """Adds so many more of a prompt's tokens to its part; returns how many there were."""
        text = item.text
        more = min(text.left, budget)
        if more > 0:
            item.length += more
            text.sent += more
            if not text.left:
                self._prefill.remove(text)
                text.state = State.FLYING
                item.samples = 1
        return more

    def _admit(self) -> Text | None:
        """Lets the next text that waits in, if there is room."""
        while (text := self.waiting.first) is not None:
            shared, worth = self.tables.find(text)
            if worth is not None:
                self.waiting.hold(text, worth)
                continue
            # Room for each running text to grow, so that nobody soon has to give way.
            spare = max(self.running, self.tables.blocks // 100) if self._running else 0
            return text if self._place(text, shared, spare) else None
        return None

    def _place(self, text: Text, shared: list[int], spare: int) -> bool:
        if not self.tables.place(text, shared, spare):
            return False
        self.waiting.remove(text)
        text.state = State.PREFILL
        self._running.add(text)
        bisect.insort(self._prefill, text, key=by_order)
        return True

    def _requeue(self, text: Text) -> None:
        self._leave(text, State.WAITING)
        self.waiting.add(text)

    def _leave(self, text: Text, state: State) -> None:
        """Takes a running text's blocks away."""
        if text.state is State.PREFILL:
            self._prefill.remove(text)
        self._ready.pop(text, None)
        self._running.remove(text)
        if text.sequence_id:
            self.released.append(text.sequence_id)
        self.waiting.wake(self.tables.vacate(text))
        text.stop(state)
