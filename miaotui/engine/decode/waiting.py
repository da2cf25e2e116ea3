"""The texts that wait for KV blocks, in the order in which they arrived."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

from miaotui.engine.decode.sequence import Text
from miaotui.engine.scheduler import QueueFullError


def by_order(text: Text) -> int:
    """Sorts texts by their arrival."""
    return text.order


class WaitingTexts:
    """First come, first served. Not thread-safe.

    A text is held back while another computes a beginning that both share: once that is
    there, it need not be computed again.
    """

    def __init__(self, *, max_texts: int, max_tokens: int, source_rows: int = 0) -> None:
        """`source_rows`: an encoder's rows of each text, which count as tokens."""
        self.max_texts = max_texts
        self.max_tokens = max_tokens
        self.tokens = 0
        """Of all that wait."""
        self.held_tokens = 0
        """Of those that are held back."""
        self._source_rows = source_rows
        self._queue: list[Text] = []
        self._held: dict[Text, bytes] = {}
        self._holding: dict[bytes, list[Text]] = {}

    def __len__(self) -> int:
        return len(self._queue) + len(self._held)

    def __iter__(self) -> Iterator[Text]:
        """In no particular order."""
        yield from self._queue
        yield from self._held

    @property
    def first(self) -> Text | None:
        """The one whose turn it is, if any is not held back."""
        return self._queue[0] if self._queue else None

    def check(self, texts: int, tokens: int) -> None:
        """Raises `QueueFullError` where so many more do not fit."""
        tokens += texts * self._source_rows
        # A single huge request may still run on an idle pipeline.
        if len(self) + texts > self.max_texts or (self and self.tokens + tokens > self.max_tokens):
            raise QueueFullError(
                f"the queue holds {len(self)} texts ({self.tokens} tokens) and takes "
                f"{self.max_texts} ({self.max_tokens} tokens) at most; try again later"
            )

    def add(self, text: Text) -> None:
        """Queues a text, whatever the bounds: those that ran before come back this way."""
        self.tokens += text.length + self._source_rows
        bisect.insort(self._queue, text, key=by_order)

    def remove(self, text: Text) -> None:
        """Takes a text out."""
        self.tokens -= text.length + self._source_rows
        digest = self._held.get(text)
        if digest is None:
            del self._queue[bisect.bisect_left(self._queue, text.order, key=by_order)]
            return
        self._let_go(text)
        self._holding[digest].remove(text)
        if not self._holding[digest]:
            del self._holding[digest]

    def hold(self, text: Text, digest: bytes) -> None:
        """Passes a text over until `wake` is called for the block that it waits for."""
        del self._queue[bisect.bisect_left(self._queue, text.order, key=by_order)]
        self._held[text] = digest
        self._holding.setdefault(digest, []).append(text)
        self.held_tokens += text.length + self._source_rows

    def wake(self, digests: Iterable[bytes]) -> None:
        """These blocks are there now, or never will be."""
        if not self._held:
            return
        for digest in digests:
            for text in self._holding.pop(digest, ()):
                self._let_go(text)
                bisect.insort(self._queue, text, key=by_order)

    def _let_go(self, text: Text) -> None:
        del self._held[text]
        self.held_tokens -= text.length + self._source_rows
