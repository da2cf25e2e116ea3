"""Collections for the event loop: nothing in here blocks it."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from gateway.documents.encoding import LazyEncoder
from gateway.documents.preparing import Preparer
from gateway.errors import FieldError, GatewayError
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
from miaotui.retrieval.library import Library
from miaotui.retrieval.prepare import Prepared, sha256_of
from miaotui.retrieval.reading import Limits
from miaotui.retrieval.terms import chinese_share

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 4
# Small, so that the thread is soon free for shutdown, and little is done again after a crash.
_EMBED_PASSAGES = 16


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


class Documents:
    """The user's collections. Methods raise `GatewayError` where the store cannot be used."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._encoder = LazyEncoder()
        self._library = Library(settings.documents_directory, encoder=self._encoder.name)
        limits = Limits(settings.max_upload_bytes, settings.max_document_characters)
        self._preparer = Preparer(limits, settings.reading_timeout)
        self._threads = ThreadPoolExecutor(_THREADS, "documents")
        self._embedding: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def start(self) -> None:
        """Begins to give passages vectors, in the background."""
        self._news.set()
        self._embedding = asyncio.create_task(self._embed_all())

    async def close(self) -> None:
        """Ends background work and closes all collections."""
        if self._embedding is not None:
            self._embedding.cancel()
            await asyncio.gather(self._embedding, return_exceptions=True)
        self._preparer.close()
        self._encoder.close()
        await asyncio.to_thread(self._threads.shutdown)
        self._library.close()

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
        return await self._run(self._library.get, name)

    async def _made(self, name: str) -> Collection:
        made = await self._run(partial(self._library.get, name, create=True))
        assert made is not None
        return made

    async def collections(self) -> list[CollectionCounts]:
        """All collections."""
        found = []
        for name in await self._run(self._library.names):
            collection = await self.collection(name)
            if collection is not None:
                found.append(CollectionCounts(name, await self._run(collection.counts)))
        return found

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a collection's method on a thread."""
        return await self._run(work, *args, **kwargs)

    async def search(self, collection: Collection, query: str, limit: int) -> list[Found]:
        """The best passages for a question, best first."""
        vector = None
        if chinese_share(query) <= MOST_CHINESE:
            encoding = self._encoder.question(query)
            if encoding is not None:
                vector = partial(_only_row, encoding)
        return await self._run(collection.search, query, vector, limit)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, partial(work, *args, **kwargs))
        except CollectionNameError as error:
            raise invalid([FieldError("/collection", str(error))]) from None
        except (StoreError, sqlite3.Error, OSError) as error:
            log.error("the documents' store failed: %s", error)
            raise GatewayError("unavailable", "The documents' store cannot be used now.") from None

    # -- vectors --------------------------------------------------------------------------

    async def _embed_all(self) -> None:
        """Gives vectors to passages that have none, whenever there is news."""
        done: dict[str, int] = {}
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                for name in await self._run(self._library.names):
                    collection = await self.collection(name)
                    if collection is not None:
                        done[name] = await self._embed(collection, done.get(name, 0))
            except GatewayError:
                pass  # it has been logged; the next news bring the next try

    async def _embed(self, collection: Collection, after: int) -> int:
        """Works through the passages behind `after`; returns the last one done."""
        while waiting := await self._run(collection.without_vector, after, _EMBED_PASSAGES):
            vectors = await self._encoder.passages([text for _, text in waiting])
            if vectors is None:
                return after
            ids = [identifier for identifier, _ in waiting]
            await self._run(collection.add_vectors, ids, vectors)
            after = ids[-1]
        return after


def _only_row(encoding: Future[Vectors]) -> Vectors:
    row: Vectors = encoding.result()[0]
    return row
