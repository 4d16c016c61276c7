"""What all tests share: one thread, deterministic examples, an environment without our settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

KEPT = ("FOT_SOAK_",)  # Sizes of the soak tests.


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
