"""One Ray of three nodes for all tests of this room: it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.nodes import RayNodes, ray_nodes


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayNodes]:
    """A head and two workers of 2 CPUs each; this process is a driver of it. Put back the nodes you remove."""
    with ray_nodes(workers=2) as nodes:
        yield nodes


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run side by side share one cluster: those of this room stay in one process.

    First, for pytest-xdist reads the marks in the same hook.
    """
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not item.path.name.startswith("test_deploy_"):
            item.add_marker(pytest.mark.xdist_group("ray"))
