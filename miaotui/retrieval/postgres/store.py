"""All tenants' collections in one PostgreSQL database."""

from __future__ import annotations

import threading

from miaotui.retrieval.library import check_name
from miaotui.retrieval.postgres import schema
from miaotui.retrieval.postgres.collection import PostgresCollection
from miaotui.retrieval.postgres.location import PostgresLocation
from miaotui.retrieval.postgres.server import Server
from miaotui.retrieval.terms import TERMS_VERSION


class PostgresStore:
    """A `Store`."""

    kind = "PostgreSQL"

    def __init__(self, location: PostgresLocation, *, encoder: str = "") -> None:
        """`encoder`: name of what makes the vectors; vectors of another one are dropped."""
        self._server = Server(location, schema.prepare)
        self._encoder = encoder

    def check(self) -> None:
        """See `Store.check`. Makes the tables where they are missing."""
        with self._server.reading():
            pass

    def library(self, tenant: str) -> PostgresLibrary:
        """See `Store.library`."""
        return PostgresLibrary(self._server, tenant, self._encoder)

    def tenants(self) -> list[str]:
        """See `Store.tenants`."""
        with self._server.reading() as connection:
            rows = connection.execute(
                "SELECT DISTINCT tenant FROM collections WHERE tenant <> ''"
            ).fetchall()
        return sorted(tenant for (tenant,) in rows)

    def close(self) -> None:
        """Closes its connections."""
        self._server.close()


class PostgresLibrary:
    """A `Library`. It keeps nothing of a collection but that it is in order."""

    def __init__(self, server: Server, tenant: str, encoder: str) -> None:
        """`encoder`: as of `PostgresStore`."""
        self._server = server
        self._tenant = tenant
        self._encoder = encoder
        self._renewed: set[int] = set()
        self._renewing = threading.Lock()

    def names(self) -> list[str]:
        """See `Library.names`."""
        with self._server.reading() as connection:
            rows = connection.execute(
                "SELECT name FROM collections WHERE tenant = %s", (self._tenant,)
            ).fetchall()
        return sorted(name for (name,) in rows)

    def get(self, name: str, *, create: bool = False) -> PostgresCollection | None:
        """See `Library.get`."""
        name = check_name(name)
        with self._server.reading() as connection:
            select = (
                "SELECT number, encoder, terms FROM collections WHERE tenant = %s AND name = %s"
            )
            row = connection.execute(select, (self._tenant, name)).fetchone()
            if row is None and create:
                connection.execute(
                    "INSERT INTO collections (tenant, name, encoder, terms) "
                    "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                    (self._tenant, name, self._encoder, TERMS_VERSION),
                )
                row = connection.execute(select, (self._tenant, name)).fetchone()
        if row is None:
            return None
        number, encoder, terms = row
        collection = PostgresCollection(self._server, number, name)
        with self._renewing:
            # Once a process: gateways with different encoders would undo each other's work.
            if number not in self._renewed:
                if terms != TERMS_VERSION or (self._encoder and encoder != self._encoder):
                    collection.renew(self._encoder)
                self._renewed.add(number)
        return collection

    def close(self) -> None:
        """See `Library.close`; the connections are the store's."""
