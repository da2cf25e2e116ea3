"""Collections for the event loop: nothing in here blocks it."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from gateway.access.tenancy import TenantLibraries
from gateway.documents.encoding import StageEncoder, State
from gateway.documents.preparing import Preparer
from gateway.documents.schema import Dense
from gateway.errors import FieldError, GatewayError
from gateway.metrics import GatewayMetrics
from gateway.models import EncoderPair
from gateway.schema import invalid
from gateway.settings import GatewaySettings
from miaotui.retrieval.collection import (
    MOST_CHINESE,
    Collection,
    Counts,
    Found,
    Outcome,
    document_id,
)
from miaotui.retrieval.encoder import Vectors
from miaotui.retrieval.errors import CollectionNameError, StoreError
from miaotui.retrieval.library import Library, open_store
from miaotui.retrieval.prepare import Prepared, sha256_of
from miaotui.retrieval.reading import Limits
from miaotui.retrieval.terms import chinese_share

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 4
# Few, so that little is done again after a crash.
_EMBED_PASSAGES = 16
_DENSE: dict[State, Dense] = {"none": "off", "away": "away", "serving": "used"}
# After so many seconds passages are tried again whose vectors could not be made or kept.
_AGAIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Added:
    """What adding a document did."""

    id: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class CollectionCounts:
    """A collection and what it holds."""

    name: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search found, best first, and whether it went by meaning, too."""

    found: list[Found]
    dense: Dense


class Documents:
    """The user's collections. Methods raise `GatewayError` where the store cannot be used."""

    def __init__(
        self,
        settings: GatewaySettings,
        encoder: EncoderPair | None = None,
        metrics: GatewayMetrics | None = None,
    ) -> None:
        """`encoder`: what makes vectors; None: documents are found by their words only."""
        self._encoder = StageEncoder(encoder)
        self._metrics = metrics
        self._libraries = TenantLibraries(
            open_store(settings.documents_store, encoder=self._encoder.name)
        )
        limits = Limits(settings.max_upload_bytes, settings.max_document_characters)
        self._preparer = Preparer(limits, settings.reading_timeout)
        self._threads = ThreadPoolExecutor(_THREADS, "documents")
        self._embedding: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def start(self) -> None:
        """Begins to give passages vectors, in the background."""
        if self._encoder.state == "none":
            log.info(
                "documents are found by their words only; MIAOTUI_GATEWAY_ENCODER_STAGES names "
                "the stages that find them by their meaning, too"
            )
        self._news.set()
        self._embedding = asyncio.create_task(self._embed_all())

    async def close(self) -> None:
        """Ends background work and closes all collections."""
        if self._embedding is not None:
            self._embedding.cancel()
            await asyncio.gather(self._embedding, return_exceptions=True)
        self._preparer.close()
        await asyncio.to_thread(self._threads.shutdown)
        self._libraries.close()

    # -- changes --------------------------------------------------------------------------

    async def add_file(self, name: str, source: str, data: bytes) -> Added:
        """Adds or replaces a file. Raises `UnreadableError`."""
        return await self._add(name, source, data, lambda: self._preparer.file(source, data))

    async def add_text(self, name: str, source: str, text: str, title: str) -> Added:
        """Adds or replaces a text, whose offsets hold as it was sent. Raises `UnreadableError`."""
        data = text.encode("utf-8", "surrogatepass")
        prepare = partial(self._preparer.text, source, text, title)
        return await self._add(name, source, data, prepare)

    async def _add(
        self,
        name: str,
        source: str,
        data: bytes,
        prepare: Callable[[], Coroutine[Any, Any, Prepared]],
    ) -> Added:
        collection = await self._made(name)
        if await self._run(collection.has, source, await self._run(sha256_of, data)):
            return Added(document_id(source), Outcome.UNCHANGED)
        prepared = await prepare()
        outcome, identifier = await self._run(collection.add, prepared)
        self._news.set()
        return Added(identifier, outcome)

    async def delete(self, name: str, identifier: str) -> bool:
        """Removes a document; whether it was there."""
        collection = await self.collection(name)
        return collection is not None and await self._run(collection.delete, identifier)

    # -- looks ----------------------------------------------------------------------------

    async def collection(self, name: str) -> Collection | None:
        """A collection, or `None`; its methods block, see `run`."""
        return await self._run(self._libraries.current().get, name)

    async def _made(self, name: str) -> Collection:
        made = await self._run(partial(self._libraries.current().get, name, create=True))
        assert made is not None
        return made

    async def collections(self) -> list[CollectionCounts]:
        """All collections of the caller's."""
        found = []
        for name in await self._run(self._libraries.current().names):
            collection = await self.collection(name)
            if collection is not None:
                found.append(CollectionCounts(name, await self._run(collection.counts)))
        return found

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a collection's method on a thread."""
        return await self._run(work, *args, **kwargs)

    @property
    def encoder(self) -> State:
        """Whether passages get vectors now."""
        return self._encoder.state

    async def search(self, collection: Collection, query: str, limit: int) -> Searched:
        """The best passages for a question, best first."""
        asked = None
        dense: Dense = "language"
        if chinese_share(query) <= MOST_CHINESE:
            asked = _Asked(self._encoder.question(query))
            dense = _DENSE[self._encoder.state]
        vector = None if asked is None or asked.vector is None else asked.wait
        found = await self._run(collection.search, query, vector, limit)
        if asked is not None and dense == "used":
            dense = asked.outcome
        if self._metrics is not None:
            self._metrics.retrieved(dense)
        return Searched(found, dense)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, partial(work, *args, **kwargs))
        except CollectionNameError as error:
            raise invalid([FieldError("/collection", str(error))]) from None
        except (StoreError, sqlite3.Error, OSError) as error:
            log.error("the documents' store failed: %s", error)
            detail = f"The documents' store ({self._libraries.store.kind}) cannot be used now."
            raise GatewayError("unavailable", detail) from None

    # -- vectors --------------------------------------------------------------------------

    async def _embed_all(self) -> None:
        """Gives vectors to passages that have none, whenever there is news or the stages return.

        What could not be done is done later: passages wait in the store.
        """
        done: dict[tuple[Library, str], int] = {}
        loop = asyncio.get_running_loop()
        with suppress(GatewayError):  # it is logged, which is what this first look is for
            await self._run(self._libraries.store.check)
        while True:
            await self._news.wait()
            await self._encoder.serving()
            self._news.clear()
            whole = True
            try:
                await self._run(self._libraries.store.check)
                for library in await self._run(self._libraries.every):
                    for name in await self._run(library.names):
                        collection = await self._run(library.get, name)
                        if collection is not None:
                            whole &= await self._embed(collection, done, (library, name))
            except GatewayError:
                whole = False  # it has been logged
            if not whole:
                loop.call_later(_AGAIN_SECONDS, self._news.set)

    async def _embed(
        self,
        collection: Collection,
        done: dict[tuple[Library, str], int],
        key: tuple[Library, str],
    ) -> bool:
        """Works through a collection's passages behind `done[key]`, the last one with a vector;
        returns whether it came to the end."""
        while waiting := await self._run(
            collection.without_vector, done.get(key, 0), _EMBED_PASSAGES
        ):
            vectors = await self._encoder.passages([text for _, text in waiting])
            if vectors is None:
                return False
            ids = [identifier for identifier, _ in waiting]
            await self._run(collection.add_vectors, ids, vectors)
            done[key] = ids[-1]
        return True


class _Asked:
    """A question's vector that is under way, and what became of it."""

    def __init__(self, vector: Future[Vectors | None] | None) -> None:
        self.vector = vector
        self.outcome: Dense = "away" if vector is None else "no-vectors"

    def wait(self) -> Vectors | None:
        """The vector, once it is there. Only called where there are vectors to compare with."""
        assert self.vector is not None
        try:
            row = self.vector.result()
        except CancelledError:
            row = None
        self.outcome = "away" if row is None else "used"
        return row
