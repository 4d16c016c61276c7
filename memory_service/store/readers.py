"""Who reads what a change has replaced: it is released when the last of them is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Release = Callable[[], None]


class Readers:
    """Counts readers by the version they began with. Thread-safe by the lock of the state that they read."""

    def __init__(self, state: threading.Lock):
        self.version = 0  # Grows with every change.
        self._state = state
        self._reading: dict[int, int] = {}
        self._retired: list[tuple[int, Release]] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep everything that could be seen when this began."""
        with self._state:
            version = self.version
            self._reading[version] = self._reading.get(version, 0) + 1
        try:
            yield
        finally:
            with self._state:
                self._reading[version] -= 1
                if not self._reading[version]:
                    del self._reading[version]
            self.release()

    def changed(self) -> None:
        """Who begins to read from now on sees a change. Hold the state's lock."""
        self.version += 1

    def retire(self, release: Release) -> None:
        """Have `release` called once nobody reads who saw what was there before the last change. Hold the lock."""
        self._retired.append((self.version, release))

    def release(self) -> None:
        """Call what waited for readers that are now gone. Do not hold the lock."""
        with self._state:
            oldest = min(self._reading, default=self.version)
            due = [release for version, release in self._retired if version <= oldest]
            self._retired = [(version, release) for version, release in self._retired if version > oldest]
        for release in due:
            release()
