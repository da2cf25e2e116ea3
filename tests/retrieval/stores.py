"""The stores that there are, opened anew as often as a test wants."""

from __future__ import annotations

from uuid import uuid4

from miaotui.retrieval.collection import SqliteCollection
from miaotui.retrieval.library import Library, Store, open_store
from miaotui.retrieval.postgres.collection import PostgresCollection


class Place:
    """A store's location; each handle opened here is as another process has it."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.tenant = f"t-{uuid4().hex}"
        self._opened: list[tuple[Store, Library]] = []

    def library(self, *, encoder: str = "", tenant: str | None = None) -> Library:
        """A new handle of a library."""
        store = open_store(self.location, encoder=encoder)
        library = store.library(self.tenant if tenant is None else tenant)
        self._opened.append((store, library))
        return library

    def collection(
        self, name: str = "c", *, encoder: str = ""
    ) -> SqliteCollection | PostgresCollection:
        """A new handle of a collection, which is made where there is none."""
        collection = self.library(encoder=encoder).get(name, create=True)
        assert isinstance(collection, SqliteCollection | PostgresCollection)
        return collection

    def close(self) -> None:
        """Closes all handles."""
        for store, library in self._opened:
            library.close()
            store.close()
        self._opened.clear()
