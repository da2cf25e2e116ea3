"""One detokeniser for all texts: what comes in one turn of the event loop is one call."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Iterable, Sequence

from gateway.calling import retried
from gateway.errors import GatewayError
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.breaker import RetryBudget
from services.rpc.channel import UnaryMethod
from services.rpc.tracing import UNSAMPLED

DECODE_SECONDS = 5.0

Decode = UnaryMethod[tokenizer_pb.DecodeBatchRequest, tokenizer_pb.DecodeBatchResponse]


class _Asked:
    __slots__ = ("future", "items", "pieces")

    def __init__(self, items: Sequence[tokenizer_pb.DecodeItem], pieces: frozenset[int]) -> None:
        self.items = items
        self.pieces = pieces
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[tokenizer_pb.DecodedItem]] = loop.create_future()


class Detokenizer:
    """Asks the tokenizer service with one call in flight; what comes meanwhile is the next.

    The tokens of a step of all streams come in one message, so the first stream's question
    waits for the others' of the same turn.
    """

    def __init__(
        self,
        decode: Decode,
        before_again: Callable[[], Awaitable[None]] | None = None,
        budget: RetryBudget | None = None,
    ) -> None:
        """`before_again`, `budget`: as for `retried`."""
        self._decode = decode
        self._before_again = before_again
        self._budget = budget
        self._asked: list[_Asked] = []
        self._task: asyncio.Task[None] | None = None
        self._pieces: dict[int, bytes] = {}
        self._fingerprint = ""

    async def read(
        self, items: Sequence[tokenizer_pb.DecodeItem], pieces: Iterable[int] = ()
    ) -> list[tokenizer_pb.DecodedItem]:
        """The items' new text; `piece` knows `pieces` afterwards. Raises `GatewayError`."""
        asked = _Asked(items, frozenset(pieces))
        self._asked.append(asked)
        if self._task is None:
            # No request's trace or deadline: the call is everybody's, and a trace of its own
            # would tell of many calls a second what metrics tell. As a task it starts after all
            # that is ready now.
            self._task = asyncio.get_running_loop().create_task(
                self._work(), context=contextvars.Context()
            )
        return await asked.future

    def model(self, fingerprint: str) -> None:
        """The tokenizer now; pieces of another are forgotten."""
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._pieces.clear()

    def piece(self, token: int) -> bytes:
        """A token's bytes, once they were asked for."""
        return self._pieces.get(token, b"")

    async def _work(self) -> None:
        try:
            while self._asked:
                asked, self._asked = self._asked, []
                await self._read(asked)
        finally:
            self._task = None

    async def _read(self, asked: list[_Asked]) -> None:
        wanted = frozenset().union(*(one.pieces for one in asked)) - self._pieces.keys()
        pieces = sorted(wanted)
        request = tokenizer_pb.DecodeBatchRequest(
            items=[item for one in asked for item in one.items], pieces=pieces
        )
        try:
            response = await retried(
                lambda: self._decode(request, timeout=DECODE_SECONDS, metadata=UNSAMPLED),
                "tokenizer",
                self._before_again,
                self._budget,
            )
            if len(response.items) != len(request.items) or len(response.pieces) != len(pieces):
                raise GatewayError("service-failed", "The tokenizer's reply does not fit.")
        except GatewayError as error:
            _fail(asked, error)
            return
        except BaseException:
            _fail(asked, GatewayError("internal", "Something went wrong that should not."))
            raise
        self._pieces.update(zip(pieces, response.pieces, strict=True))
        items = list(response.items)
        first = 0
        for one in asked:
            count = len(one.items)
            if not one.future.done():
                one.future.set_result(items[first : first + count])
            first += count

    async def close(self) -> None:
        """Ends the call in flight."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _fail(asked: list[_Asked], error: GatewayError) -> None:
    for one in asked:
        if not one.future.done():
            one.future.set_exception(error)
