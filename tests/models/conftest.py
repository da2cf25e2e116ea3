"""Checkpoints of every family, written once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import FAMILIES, make_checkpoint, one_thread

LAYERS = 4


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family to model directory, 4 layers each. Tests must not change them."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: make_checkpoint(root / family, family, layers=LAYERS, seed=7) for family in FAMILIES
    }


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT checkpoint of the test's own, to damage."""
    return make_checkpoint(tmp_path / "bert", "bert", layers=2, hidden=16, heads=2)
