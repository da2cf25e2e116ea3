"""Connections to a PostgreSQL server, shared by threads, and what goes wrong with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import errors

from miaotui.retrieval.errors import StoreError
from miaotui.retrieval.postgres.location import PostgresLocation

Connection = psycopg.Connection[tuple[Any, ...]]

_MOST_CONNECTIONS = 8
_BUSY_SECONDS = 30.0
# Unless the URL says otherwise: a server that has gone without a word is noticed.
_OPTIONS: dict[str, Any] = {
    "application_name": "miaotui",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_SETTINGS = (
    "SELECT set_config('search_path', 'miaotui,' || coalesce("
    " (SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n"
    "  ON n.oid = e.extnamespace WHERE e.extname = 'vector'), 'public'), false),"
    f" set_config('lock_timeout', '{_BUSY_SECONDS:g}s', false),"
    " set_config('idle_in_transaction_session_timeout', '60s', false),"
    # Compiling a query takes longer than any of ours.
    " set_config('jit', 'off', false),"
    # Neighbours that a search looks at: more than are asked for, for the sake of recall.
    " set_config('hnsw.ef_search', '200', false)"
)
# The tables went away under us, with their database: they are made anew.
_GONE = (errors.UndefinedTable, errors.InvalidSchemaName)


class Server:
    """Thread-safe. Connections are opened when needed, tested when taken, and kept."""

    def __init__(
        self, location: PostgresLocation, prepare: Callable[[Connection, str], None]
    ) -> None:
        """`prepare`: makes what must be there, before the first use; given the shown name."""
        self.shown = location.shown
        self._location = location
        self._prepare = prepare
        self._prepared = False
        self._preparing = threading.Lock()
        self._slots = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._idle: list[Connection] = []
        self._lock = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection on which each statement is by itself. Raises `StoreError`."""
        if not self._slots.acquire(timeout=_BUSY_SECONDS):
            raise StoreError(f"{self.shown}: all connections are busy")
        try:
            connection = self._take()
            try:
                yield connection
            finally:
                self._give_back(connection)
        except psycopg.Error as error:
            if isinstance(error, _GONE):
                self._prepared = False
            raise StoreError(f"{self.shown}: {self._told(error)}") from None
        finally:
            self._slots.release()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A connection in a transaction, which is on disk when this ends, or rolled back.

        Raises `StoreError`.
        """
        with self.reading() as connection, connection.transaction():
            yield connection

    def close(self) -> None:
        """Closes the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> Connection:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                connection.execute("")
            except psycopg.OperationalError:
                connection.close()
                self.close()  # the others have not survived what this one did not
            else:
                if self._prepared:
                    return connection
                connection.close()
        connection = self._connect()
        try:
            connection.execute(_SETTINGS)
            with self._preparing:
                if not self._prepared:
                    self._prepare(connection, self.shown)
                    connection.execute(_SETTINGS)
                    self._prepared = True
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self) -> Connection:
        options = {k: v for k, v in _OPTIONS.items() if k not in self._location.options}
        # Statements are not prepared: plans then fit the numbers of their query.
        return psycopg.connect(
            self._location.url,
            autocommit=True,
            prepare_threshold=None,
            client_encoding="utf8",
            **options,
        )

    def _give_back(self, connection: Connection) -> None:
        idle = psycopg.pq.TransactionStatus.IDLE
        if connection.closed or connection.info.transaction_status != idle:
            connection.close()
            return
        with self._lock:
            self._idle.append(connection)

    def _told(self, error: psycopg.Error) -> str:
        """The error in a line, without the values that it is about."""
        primary = error.diag.message_primary
        if primary is not None:
            return f"{primary} (SQLSTATE {error.sqlstate})"
        told = " ".join(str(error).split())
        password = self._location.password
        return told.replace(password, "***") if password else told
