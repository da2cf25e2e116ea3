"""What the end-to-end tests share: checkpoints, and the services' logs in failure reports."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.processes import RedisServer, running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the last lines of all services that run when a test fails."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {process.name}", process.tail()) for process in running]
    return report


Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Makes tiny checkpoints, each once: `checkpoint("bert", layers=3, seed=0)`."""
    made: dict[tuple[str, int, int, int], Path] = {}

    def make(family: str = "bert", *, layers: int = 3, hidden: int = 32, seed: int = 0) -> Path:
        key = (family, layers, hidden, seed)
        if key not in made:
            directory = tmp_path_factory.mktemp("model") / f"{family}-{layers}-{hidden}-{seed}"
            made[key] = make_checkpoint(directory, family, layers=layers, hidden=hidden, seed=seed)
        return made[key]

    return make


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test's own."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()
