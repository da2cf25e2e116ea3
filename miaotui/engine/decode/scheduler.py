"""Which texts' tokens run next, and in which KV blocks.

Iteration-level batching after Orca (Yu et al., OSDI 2022): texts join and leave at every
step. Prompts are computed in chunks beside the others' tokens, after Sarathi-Serve (Agrawal
et al., OSDI 2024). What is ready is spread over as many batches as the pipeline has stages.
"""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from dataclasses import dataclass

from miaotui.engine.decode.blocks import BlockHasher, BlockPool
from miaotui.engine.decode.sequence import NO_TOKENS, State, Text
from miaotui.engine.decode.settings import GenerationSettings
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
    """The texts that wait and run, and their KV blocks. The event loop owns it.

    Relies on every stage to compute batches in the order planned: blocks are given to others
    as soon as their text leaves, whatever of it is still on its way.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self.settings = settings
        self.waiting = WaitingTexts(
            max_texts=settings.queue_sequences, max_tokens=settings.queue_tokens
        )
        self.pool: BlockPool | None = None
        self.block_tokens = 0
        self.released: list[int] = []
        """Ids of sequences that have ended and that no batch has reported yet."""
        self.preemptions = 0
        self.shared_tokens = 0
        """Tokens that were not computed because their blocks were there already."""
        self._ids = itertools.count(1)
        self._hasher = BlockHasher()
        self._running: set[Text] = set()
        self._prefill: list[Text] = []
        self._ready: OrderedDict[Text, None] = OrderedDict()
        self._pending: dict[bytes, Text] = {}
        """Blocks that are being computed and will then be published, and by whom."""

    @property
    def running(self) -> int:
        """Texts that hold KV blocks."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or holds a KV block."""
        return not (
            self.waiting
            or self._running
            or self._prefill
            or self._ready
            or self._pending
            or (self.pool is not None and self.pool.used)
        )

    @property
    def capacity(self) -> int | None:
        """Tokens that the KV cache holds; None while its size is not known."""
        return None if self.pool is None else self.pool.blocks * self.block_tokens

    # -- coming and going ------------------------------------------------------------------

    def configure(self, blocks: int, block_tokens: int) -> None:
        """Says how large the KV cache is; nothing may run."""
        if block_tokens < 1:
            raise ValueError(f"KV blocks of {block_tokens} tokens hold nothing")
        if self.pool is not None and block_tokens != self.block_tokens:
            for text in self.waiting:
                text.digests = []
                text.work.prompt_digests = []
        self.pool = BlockPool(blocks)
        self.block_tokens = block_tokens

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

    def reset(self) -> list[Text]:
        """Puts all that runs back in the queue, and forgets what the KV cache holds."""
        texts = sorted(self._running, key=by_order)
        for text in texts:
            self._requeue(text)
        if self.pool is not None:
            self.pool.clear()
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
        self._publish(text)

    # -- planning ----------------------------------------------------------------------------

    def plan(self, *, in_flight: int, decoding: int) -> Plan | None:
        """The next batch, or None where nothing should be sent now.

        `in_flight`: batches in the pipeline; `decoding`: those of them with `Plan.decodes`.
        """
        settings = self.settings
        if self.pool is None or in_flight >= settings.max_in_flight:
            return None
        while True:
            slices: list[Slice] = []
            preemptions = self.preemptions
            if self._ready and decoding < settings.groups:
                slices = self._decode()
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

    def _decode(self) -> list[Slice]:
        """The next tokens of a share of the texts that are ready."""
        writing = len(self._running) - len(self._prefill)
        share = min(-(-writing // self.settings.groups), self.settings.batch_tokens)
        texts = [self._ready.popitem(last=False)[0] for _ in range(min(share, len(self._ready)))]
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
            if len(draft):
                share = min(-(-spare // hopeful), self._stretch(text, len(draft)))
                hopeful -= 1
                drafts[index] = draft[:share]
                spare -= len(drafts[index])
        return drafts

    def _stretch(self, text: Text, draft: int) -> int:
        """Sees that there are blocks for a draft; returns for how much of it."""
        assert self.pool is not None
        missing = -(-(text.length + draft) // self.block_tokens) - text.table.size
        if missing > 0:
            # Nobody is to give way for a mere guess.
            if missing + len(self._running) > self.pool.available:
                return text.table.size * self.block_tokens - text.length
            text.table.extend(self.pool.take(missing))
        return draft

    def _grow(self, text: Text) -> bool:
        """Sees that there is a block for a text's newest token; False: it gave way itself."""
        assert self.pool is not None
        if text.table.size * self.block_tokens >= text.length:
            return True
        while not self.pool.available:
            # The latest has the least to lose, and so the earliest always gets on.
            victim = max(self._running, key=by_order)
            victim.work.usage.preemptions += 1
            self.preemptions += 1
            self._requeue(victim)
            if victim is text:
                return False
        text.table.extend(self.pool.take(1))
        return True

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
        for text in list(self._prefill):
            if budget < 1:
                return
            unsent -= text.left
            budget -= self._chunk(slices, text, budget, unsent)
        while admit and budget > 0 and len(self._running) < settings.max_running:
            admitted = self._admit()
            if admitted is None:
                return
            unsent -= admitted.length
            budget -= self._chunk(slices, admitted, budget, unsent)

    def _chunk(self, slices: list[Slice], text: Text, budget: int, others: int) -> int:
        # A long prompt leaves half to those behind it, as far as they can use it.
        length = min(text.left, max(budget - max(others, 0), -(-budget // 2)))
        last = length == text.left
        first = not text.sequence_id
        if first:
            text.sequence_id = next(self._ids)
            text.work.begin(text)
        slices.append(Slice(text, text.sequence_id, text.sent, length, int(last), NO_TOKENS, first))
        text.sent += length
        if last:
            self._prefill.remove(text)
            text.state = State.FLYING
        return length

    # -- KV blocks ---------------------------------------------------------------------------

    def _admit(self) -> Text | None:
        """Gives the next text that waits the blocks for all its tokens, if there is room."""
        pool, waiting = self.pool, self.waiting
        assert pool is not None
        while (text := waiting.first) is not None:
            shared = self._shared(text)
            if shared is None:
                continue
            fresh = -(-text.length // self.block_tokens) - len(shared)
            # Room for each running text to grow, so that nobody soon has to give way.
            spare = max(len(self._running), pool.blocks // 100) if self._running else 0
            if fresh + pool.idle(shared) + spare > pool.available:
                return None
            waiting.remove(text)
            pool.share(shared)
            text.table.extend(shared)
            text.table.extend(pool.take(fresh))
            text.published = len(shared)
            text.sent = text.computed = len(shared) * self.block_tokens
            text.state = State.PREFILL
            self._running.add(text)
            bisect.insort(self._prefill, text, key=by_order)
            for digest in text.digests[len(shared) :]:
                self._pending.setdefault(digest, text)
            self.shared_tokens += text.sent
            return text
        return None

    def _shared(self, text: Text) -> list[int] | None:
        """The blocks a text need not compute; None: it is held back, for they soon are more."""
        if not self.settings.prefix_cache:
            return []
        assert self.pool is not None
        text.extend_digests(self._hasher, self.block_tokens)
        # Its last token is always computed, for the sake of the next.
        usable = (text.length - 1) // self.block_tokens
        shared = self.pool.find(text.digests, usable)
        upcoming = text.digests[len(shared) : usable]
        owner = self._pending.get(upcoming[0]) if upcoming else None
        if owner is None:
            return shared
        last = upcoming[0]
        for digest in upcoming:
            if self._pending.get(digest) is not owner:
                break
            last = digest
        self.waiting.hold(text, last)
        return None

    def _publish(self, text: Text) -> None:
        full = text.computed // self.block_tokens
        if full <= text.published or not self.settings.prefix_cache:
            return
        assert self.pool is not None
        text.extend_digests(self._hasher, self.block_tokens)
        blocks = text.table.view(text.published, full).tolist()
        for block, digest in zip(blocks, text.digests[text.published : full], strict=True):
            self.pool.publish(block, digest)
            self._settle(text, digest)
        text.published = full

    def _settle(self, text: Text, digest: bytes) -> None:
        if self._pending.get(digest) is text:
            del self._pending[digest]
            self.waiting.wake(digest)

    def _requeue(self, text: Text) -> None:
        self._leave(text, State.WAITING)
        self.waiting.add(text)

    def _leave(self, text: Text, state: State) -> None:
        """Takes a running text's blocks away."""
        assert self.pool is not None
        if text.state is State.PREFILL:
            self._prefill.remove(text)
        self._ready.pop(text, None)
        self._running.remove(text)
        if text.sequence_id:
            self.released.append(text.sequence_id)
        for digest in text.digests[text.published :]:
            self._settle(text, digest)
        self.pool.give_back(text.table.view(0, text.table.size).tolist())
        text.stop(state)
