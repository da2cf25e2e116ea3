"""The texts' KV block tables: what they share, what they take, what they leave."""

from __future__ import annotations

from collections.abc import Iterable

from miaotui.engine.decode.blocks import BlockHasher, BlockPool
from miaotui.engine.decode.sequence import Text

# Of what a text would have to compute; below, a wait costs more than it saves.
_WORTH_WAITING = 0.25


class BlockTables:
    """Gives texts their KV blocks. Not thread-safe.

    A block is shared only once every stage has computed it, for a text that still runs.
    """

    def __init__(self, *, sharing: bool, source_rows: int = 0) -> None:
        """`sharing`: whether texts that begin alike share blocks; `source_rows`: an encoder's
        rows, for which every text has blocks before those of its tokens. Such are not shared.
        """
        self.pool: BlockPool | None = None
        self.block_tokens = 0
        self.shared_tokens = 0
        """Tokens that were not computed because their blocks were there already."""
        self._sharing = sharing and not source_rows
        self._source_rows = source_rows
        self._hasher = BlockHasher()
        self._pending: dict[bytes, Text] = {}
        """Blocks that are being computed and will then be shared, and by whom."""

    @property
    def blocks(self) -> int:
        """Blocks of the KV cache; 0 while its size is not known."""
        return 0 if self.pool is None else self.pool.blocks

    @property
    def used(self) -> int:
        """Blocks in use."""
        return 0 if self.pool is None else self.pool.used

    @property
    def cached(self) -> int:
        """Blocks that nobody uses, kept for their content."""
        return 0 if self.pool is None else self.pool.cached

    @property
    def capacity(self) -> int | None:
        """Tokens of one text that the KV cache holds; None while its size is not known."""
        if self.pool is None:
            return None
        return max(0, self.pool.blocks - self.size(0)) * self.block_tokens

    @property
    def idle(self) -> bool:
        """Whether no block is in use or being computed."""
        return not self._pending and (self.pool is None or not self.pool.used)

    def size(self, length: int) -> int:
        """Blocks of a text of `length` tokens, and of what it is about."""
        return -(-self._source_rows // self.block_tokens) - (-length // self.block_tokens)

    def configure(self, blocks: int, block_tokens: int, texts: Iterable[Text]) -> None:
        """Sets the KV cache's size; nobody may hold a block. `texts`: all that there are."""
        if block_tokens < 1:
            raise ValueError(f"KV blocks of {block_tokens} tokens hold nothing")
        if block_tokens != self.block_tokens:
            for text in texts:
                text.digests = []
                text.work.prompt_digests = []
        self.pool = BlockPool(blocks)
        self.block_tokens = block_tokens

    def clear(self) -> None:
        """Forgets all contents; nobody may hold a block."""
        if self.pool is not None:
            self.pool.clear()

    def find(self, text: Text) -> tuple[list[int], bytes | None]:
        """The blocks that a text need not compute, and one that is worth waiting for.

        That is the last one of its beginning that another text is computing right now, if
        those make up a good part of what it would have to compute itself.
        """
        if not self._sharing:
            return [], None
        assert self.pool is not None
        text.extend_digests(self._hasher, self.block_tokens)
        # Its last token is always computed, for the sake of the next.
        usable = (text.length - 1) // self.block_tokens
        shared = self.pool.find(text.digests, usable)
        worth = None
        if len(shared) < usable:
            owner = self._pending.get(text.digests[len(shared)])
            upcoming = 0
            for digest in text.digests[len(shared) : usable]:
                if owner is None or self._pending.get(digest) is not owner:
                    break
                worth = digest
                upcoming += 1
            left = text.length - len(shared) * self.block_tokens
            if upcoming * self.block_tokens < _WORTH_WAITING * left:
                worth = None
        return shared, worth

    def place(self, text: Text, shared: list[int], spare: int) -> bool:
        """Gives a text blocks for all its tokens if `spare` more are left then."""
        pool = self.pool
        assert pool is not None
        fresh = self.size(text.length) - len(shared)
        if fresh + pool.idle(shared) + spare > pool.available:
            return False
        pool.share(shared)
        text.table.extend(shared)
        text.table.extend(pool.take(fresh))
        text.published = len(shared)
        text.sent = text.computed = len(shared) * self.block_tokens
        self.shared_tokens += text.sent
        for digest in text.digests[len(shared) :]:
            self._pending.setdefault(digest, text)
        return True

    def grow(self, text: Text, length: int, spare: int = 0) -> bool:
        """Sees that a text has blocks for `length` tokens if `spare` more are left then."""
        assert self.pool is not None
        missing = self.size(length) - text.table.size
        if missing > 0:
            if missing + spare > self.pool.available:
                return False
            text.table.extend(self.pool.take(missing))
        return True

    def publish(self, text: Text) -> list[bytes]:
        """Lets others share what of a text has been computed; returns what is new."""
        full = text.computed // self.block_tokens
        if full <= text.published or not self._sharing:
            return []
        assert self.pool is not None
        text.extend_digests(self._hasher, self.block_tokens)
        digests = text.digests[text.published : full]
        blocks = text.table.view(text.published, full).tolist()
        for block, digest in zip(blocks, digests, strict=True):
            self.pool.publish(block, digest)
        text.published = full
        return self._settle(text, digests)

    def vacate(self, text: Text) -> list[bytes]:
        """Takes a text's blocks away; returns those that it will not compute after all."""
        assert self.pool is not None
        self.pool.give_back(text.table.view(0, text.table.size).tolist())
        return self._settle(text, text.digests[text.published :])

    def _settle(self, text: Text, digests: list[bytes]) -> list[bytes]:
        settled = [digest for digest in digests if self._pending.get(digest) is text]
        for digest in settled:
            del self._pending[digest]
        return settled
