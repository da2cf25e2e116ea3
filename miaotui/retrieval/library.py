"""Collections in a directory, a file each."""

from __future__ import annotations

import re
import threading
import unicodedata
from pathlib import Path
from urllib.parse import quote, unquote

from miaotui.retrieval.collection import SqliteCollection
from miaotui.retrieval.errors import CollectionNameError, StoreError

DEFAULT_COLLECTION = "default"
_SUFFIX = ".sqlite3"
_NAME = re.compile(r"\w(?:[\w .-]*\w)?")
_MOST_BYTES = 64


class Library:
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
