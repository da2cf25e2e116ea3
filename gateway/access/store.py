"""The file that keys are kept in: written by `miaotui keys`, read by the gateways.

A file, and not Redis, because it is what operators have tools for: a Kubernetes Secret, a
volume, a configuration manager; and because Redis may be gone while requests still come in.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gateway.access.keys import ApiKey, matches, split_key

log = logging.getLogger(__name__)

# How old a gateway's knowledge of the file may be.
LOOK_SECONDS = 1.0


class KeyFileError(ValueError):
    """The file cannot be used; the message says why and what to do."""


class _Content(BaseModel):
    """The file's JSON."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    keys: list[ApiKey] = []


def read_keys(path: Path) -> list[ApiKey]:
    """The keys in the file, in its order. Raises `KeyFileError`."""
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except FileNotFoundError:
        raise KeyFileError(
            f"there is no file of API keys at {path}; make one with "
            f"`miaotui keys create NAME --keys {path}`"
        ) from None
    except OSError as error:
        raise KeyFileError(
            f"the API keys at {path} cannot be read: {os.strerror(error.errno or 0)}"
        ) from None
    if mode & stat.S_IWOTH:
        raise KeyFileError(
            f"everybody on this machine may write to {path}, and so give themselves a key; "
            f"change it with `chmod 600 {path}`"
        )
    try:
        keys = _Content.model_validate_json(data).keys
    except ValidationError as error:
        # Places only: the values would be hashes and names.
        places = sorted({"/".join(map(str, fault["loc"])) or "/" for fault in error.errors()})
        raise KeyFileError(
            f"{path} is no file of API keys: wrong at {', '.join(places[:5])}. Restore it from a "
            "copy, or remove it and create the keys again"
        ) from None
    if len({key.id for key in keys}) != len(keys):
        raise KeyFileError(f"{path} holds two keys of the same id; remove one of them")
    return keys


class KeyFile:
    """Changes the file. Each change is whole or not at all, and one comes after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keys(self) -> list[ApiKey]:
        """The keys; none where there is no file yet. Raises `KeyFileError`."""
        return read_keys(self._path) if self._path.exists() else []

    def add(self, key: ApiKey) -> None:
        """Adds a key. Raises `KeyFileError`."""
        with self._changing() as keys:
            keys.append(key)

    def revoke(self, identifier: str) -> ApiKey | None:
        """Ends a key's validity and returns it; `None` where there is no such key."""
        with self._changing() as keys:
            for place, key in enumerate(keys):
                if key.id == identifier:
                    now = datetime.now(UTC).replace(microsecond=0)
                    keys[place] = key.model_copy(update={"revoked": key.revoked or now})
                    return keys[place]
        return None

    @contextmanager
    def _changing(self) -> Iterator[list[ApiKey]]:
        # Where the path is a link, the file that it leads to is replaced, not the link.
        path = self._path.resolve()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path.parent, os.O_RDONLY)
        except OSError as error:
            raise KeyFileError(
                f"{path.parent} cannot be used: {os.strerror(error.errno or 0)}"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = self.keys()
            yield keys
            self._replace(path, keys)
            os.fsync(lock)
        except OSError as error:
            raise KeyFileError(
                f"{path} cannot be written: {os.strerror(error.errno or 0)}"
            ) from None
        finally:
            os.close(lock)

    def _replace(self, path: Path, keys: list[ApiKey]) -> None:
        data = _Content(keys=keys).model_dump_json(indent=1).encode()
        # Made with mode 0600.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                # An operator may have opened it to the group that the gateway runs in.
                os.chmod(name, stat.S_IMODE(path.stat().st_mode))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


class Keyring:
    """The keys as a gateway knows them; what changes in the file is seen within a second."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises `KeyFileError`."""
        self._path = path
        self._seen: tuple[int, ...] = self._look()
        self._keys = {key.id: key for key in read_keys(path)}
        self._next_look = time.monotonic() + LOOK_SECONDS

    def find(self, text: str) -> ApiKey | None:
        """The valid key that `text` is; `None` where it is none, or was revoked."""
        if time.monotonic() >= self._next_look:
            self._refresh()
        parts = split_key(text)
        if parts is None:
            return None
        key = self._keys.get(parts[0])
        valid = matches(key, *parts) and key is not None and key.revoked is None
        return key if valid else None

    def _look(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return (found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)

    def _refresh(self) -> None:
        self._next_look = time.monotonic() + LOOK_SECONDS
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = {key.id: key for key in read_keys(self._path)}
        except KeyFileError as error:
            # A file that is half written by hand must not lock everybody out, nor let them in.
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("API keys: %d are known now", len(self._keys))
