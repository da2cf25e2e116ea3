"""Several lanes of a decoder's pipeline: each has a head of its own, and requests move on when a
lane breaks.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping

from miaotui.engine.decode.head import GenerationHead, Handle
from miaotui.engine.decode.observe import GenerationObserver
from miaotui.engine.decode.requests import Sink
from miaotui.engine.decode.types import GenerationRequest

log = logging.getLogger(__name__)


class GenerationPool:
    """One head a lane. A request stays with a lane, where its keys and values are, as long as
    the lane lasts; then it goes on at another, from the tokens it has.
    """

    def __init__(
        self, lanes: int, make: Callable[[int, GenerationObserver | None], GenerationHead]
    ) -> None:
        """`lanes`: most that there can be; `make`: the head of the lane of this number, with the
        observer of the first one.
        """
        first = make(0, None)
        self.heads = [first, *(make(lane, first.observer) for lane in range(1, lanes))]

    @property
    def queued(self) -> int:
        """Texts that wait."""
        return sum(head.queued for head in self.heads)

    @property
    def running_sequences(self) -> int:
        """Texts that hold KV blocks."""
        return sum(head.running_sequences for head in self.heads)

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return sum(head.open_requests for head in self.heads)

    @property
    def blocks(self) -> int:
        """KV blocks of all lanes that are complete."""
        return sum(head.scheduler.tables.blocks for head in self.heads if head.ready)

    @property
    def used(self) -> int:
        """KV blocks that texts hold."""
        return sum(head.scheduler.tables.used for head in self.heads)

    @property
    def cached(self) -> int:
        """KV blocks that nobody holds, kept for their content."""
        return sum(head.scheduler.tables.cached for head in self.heads)

    @property
    def preemptions(self) -> int:
        """How often a text gave up its KV blocks."""
        return sum(head.scheduler.preemptions for head in self.heads)

    @property
    def tokens(self) -> int:
        """Tokens written since the start."""
        return self.heads[0].observer.totals.tokens

    def submit(
        self,
        request_id: str,
        request: GenerationRequest,
        sink: Sink,
        *,
        deadline: float = math.inf,
        trace: Mapping[str, str] | None = None,
    ) -> Handle:
        """As `GenerationHead.submit`, at the lane with the fewest open requests."""
        return self._choose().submit(request_id, request, sink, deadline=deadline, trace=trace)

    def pipeline_up(self, lane: int, blocks: int, block_tokens: int) -> None:
        """A lane is complete; each of its stages has at least so many KV blocks for it."""
        self.heads[lane].pipeline_up(blocks, block_tokens)
        self._gather()

    def pipeline_down(self, lane: int, reason: str) -> None:
        """A lane broke: its requests go on at others, or once one is back."""
        self.heads[lane].pipeline_down(reason)
        self._gather()

    async def drain(self, seconds: float) -> None:
        """Waits until nothing is open, for at most `seconds`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.open_requests and (left := end - loop.time()) > 0:
            # Requests may move meanwhile, to a head that was idle.
            await asyncio.gather(*(head.drain(left) for head in self.heads if head.open_requests))

    def _choose(self) -> GenerationHead:
        if len(self.heads) == 1:
            return self.heads[0]
        if ready := [head for head in self.heads if head.ready]:
            return min(ready, key=_load)
        for head in self.heads:
            if head.open_requests or head.patient:
                return head
        return self.heads[0]

    def _gather(self) -> None:
        """Hands what waits at lanes that are down to those that are not."""
        if not any(head.ready for head in self.heads):
            return
        for head in self.heads:
            if head.ready or not head.open_requests:
                continue
            works = head.surrender()
            log.info("%d requests go on at another lane", len(works))
            for work in works:
                min((other for other in self.heads if other.ready), key=_load).adopt(work)


def _load(head: GenerationHead) -> int:
    return head.open_requests
