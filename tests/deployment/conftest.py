"""One Ray of three nodes for all tests of this room: it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deployment.nodes import RayNodes, ray_nodes


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayNodes]:
    """A head and two workers of 2 CPUs each; this process is a driver of it. Put back the nodes you remove."""
    with ray_nodes(workers=2) as nodes:
        yield nodes
