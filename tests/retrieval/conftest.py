"""Both stores for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import PostgresServer
from tests.retrieval.stores import Place


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A store with nothing in it, of each kind."""
    location = str(tmp_path / "documents")
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        location = server.url()
    opened = Place(location)
    yield opened
    opened.close()
