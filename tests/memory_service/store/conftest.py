"""The stores that the tests of this room share: in RAM, and in a directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_service import verbs
from memory_service.store.store import Store
from tests.memory_service.oracle import (
    ME,
)
from tests.memory_service.store.given import OPTIONS, SPEC


@pytest.fixture(params=["ram", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "ram" else tmp_path / "data"


@pytest.fixture
def store(place: Path | None) -> Iterator[Store]:
    """A store with one empty memory, "m"."""
    with Store.open(place, OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        yield store


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    """The same, in a directory."""
    with Store.open(tmp_path / "data", OPTIONS) as store:
        store.run(ME, verbs.CreateMemory("m", SPEC))
        yield store
