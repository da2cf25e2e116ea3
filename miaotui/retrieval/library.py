"""Libraries of collections, one for each tenant: in a folder, a file a collection, or on a
server."""

from __future__ import annotations

import re
import threading
import unicodedata
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

from miaotui.retrieval.collection import Collection, SqliteCollection
from miaotui.retrieval.errors import CollectionNameError, StoreError
from miaotui.retrieval.postgres.location import PostgresLocation, is_postgres

DEFAULT_COLLECTION = "default"
_SUFFIX = ".sqlite3"
_TENANTS = "tenants"
_NAME = re.compile(r"\w(?:[\w .-]*\w)?")
_MOST_BYTES = 64


class Library(Protocol):
    """A tenant's collections. Thread-safe; every method may block, and raises `StoreError`."""

    def names(self) -> list[str]:
        """The collections that there are, by name."""
        ...

    def get(self, name: str, *, create: bool = False) -> Collection | None:
        """A collection; `None` where there is none and none is to be made.

        Raises `CollectionNameError`, too.
        """
        ...

    def close(self) -> None:
        """Closes all collections."""
        ...


class Store(Protocol):
    """Where all tenants' libraries are. Thread-safe."""

    kind: str
    """Names it to callers."""

    def check(self) -> None:
        """Raises `StoreError` where it cannot be used."""
        ...

    def library(self, tenant: str) -> Library:
        """A tenant's library; of what needs no key: "". Ask once, and keep it."""
        ...

    def tenants(self) -> list[str]:
        """The tenants that have collections, without "". Raises `StoreError`."""
        ...

    def close(self) -> None:
        """Closes it; libraries have been closed before."""
        ...


def open_store(location: str, *, encoder: str) -> Store:
    """The store at a folder's path or `postgresql://…`, which is not looked at yet.

    `encoder`: name of what makes the vectors; vectors of another one are dropped. Raises
    `ValueError` for a URL that is none, and where psycopg is not installed.
    """
    if not is_postgres(location):
        return FolderStore(Path(location).expanduser(), encoder=encoder)
    parsed = PostgresLocation.parse(location)
    from miaotui.retrieval.postgres.store import PostgresStore

    return PostgresStore(parsed, encoder=encoder)


class FolderStore:
    """A `Store` of SQLite files. What needs no key lies in `directory` itself, a tenant's in a
    folder of it."""

    kind = "SQLite"

    def __init__(self, directory: Path, *, encoder: str = "") -> None:
        """`encoder`: see `SqliteCollection`. Folders are made when they are first needed."""
        self._directory = directory
        self._encoder = encoder

    def check(self) -> None:
        """See `Store.check`. A file is only opened when its collection is asked for."""

    def library(self, tenant: str) -> FolderLibrary:
        """See `Store.library`."""
        # Tenants' names are letters, digits and "-" (gateway/access/keys.py).
        folder = self._directory / _TENANTS / tenant if tenant else self._directory
        return FolderLibrary(folder, encoder=self._encoder)

    def tenants(self) -> list[str]:
        """See `Store.tenants`."""
        folder = self._directory / _TENANTS
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def close(self) -> None:
        """See `Store.close`."""


class FolderLibrary:
    """Thread-safe. A collection is opened when it is first asked for, and stays open."""

    def __init__(self, directory: Path, *, encoder: str = "") -> None:
        """`encoder`: see `SqliteCollection`. The directory is made when it is first needed."""
        self._directory = directory
        self._encoder = encoder
        self._lock = threading.Lock()
        self._open: dict[str, SqliteCollection] = {}

    def names(self) -> list[str]:
        """The collections that there are, by name."""
        if not self._directory.is_dir():
            return []
        found = (unquote(path.stem) for path in self._directory.glob(f"*{_SUFFIX}"))
        return sorted(name for name in found if _is_name(name))

    def get(self, name: str, *, create: bool = False) -> SqliteCollection | None:
        """A collection; `None` where there is none and none is to be made.

        Raises `CollectionNameError` and `StoreError`.
        """
        name = check_name(name)
        path = self._directory / f"{quote(name, safe=' ')}{_SUFFIX}"
        with self._lock:
            known = self._open.get(name)
            if known is None:
                if not create and not path.is_file():
                    return None
                try:
                    self._directory.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise StoreError(f"{self._directory} cannot be made: {error}") from None
                known = SqliteCollection(path, name, encoder=self._encoder)
                self._open[name] = known
            return known

    def close(self) -> None:
        """Closes all collections."""
        with self._lock:
            for collection in self._open.values():
                collection.close()
            self._open.clear()


def check_name(name: str) -> str:
    """The name in normal form (NFC). Raises `CollectionNameError` for one that is not allowed."""
    name = unicodedata.normalize("NFC", name)
    if not _is_name(name):
        raise CollectionNameError(
            "a collection's name has letters, digits, spaces, '-', '_' and '.', with a letter or "
            f"digit at both ends, and at most {_MOST_BYTES} bytes in UTF-8"
        )
    return name


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and len(name.encode("utf-8", "replace")) <= _MOST_BYTES
