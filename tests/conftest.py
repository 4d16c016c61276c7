"""What all tests share: one thread, deterministic examples, an environment without our settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from memory_service.process.logs import LOG
from tests.command import Fot

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

KEPT = ("FOT_SOAK_",)  # Sizes of the soak tests.
# Modules that take more than twenty seconds.
LONG = (
    "test_repository", "test_recovery", "test_corruption", "test_disk_full", "test_cluster_processes",
    "test_ingest_crash", "test_memory_congruence", "test_worker_errors", "test_api_cli", "test_model",
    "test_power_loss", "test_snapshot_faults", "test_cluster_moving", "test_cluster_failures", "test_serving",
    "test_cli",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and tests run beside server processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a developer's FOT_* variables nor the width of a terminal may change what the tests see."""
    monkeypatch.delenv("COLUMNS", raising=False)  # Set where tests run side by side.
    for name in [name for name in os.environ if name.startswith("FOT_") and not name.startswith(KEPT)]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that ran in this process leaves no handler behind: its stderr is closed by then."""
    handlers, level, propagate = list(LOG.handlers), LOG.level, LOG.propagate
    yield
    LOG.handlers[:] = handlers
    LOG.setLevel(level)
    LOG.propagate = propagate


@pytest.fixture
def fot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fot:
    """The command line, as a function."""
    return Fot(monkeypatch, capsys)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first: where tests run side by side, no process waits for another at the end."""

    def turn(item: pytest.Item) -> int:
        return 0 if _on_ray(item.nodeid) else 1 if item.path.stem in LONG else 2

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run side by side, those on Ray stay in one process and share one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if _on_ray(nodeid) else super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # By the number of tests, which says nothing of how long they take.
    return OneRay(config, log)


def _on_ray(nodeid: str) -> bool:
    return nodeid.startswith("tests/deployment/") and "/test_deploy_" not in nodeid
