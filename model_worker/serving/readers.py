"""Readers of the memories that requests bring, one a memory for as long as somebody uses it."""

from __future__ import annotations

import threading

from memory_service import Memory
from model_worker.decoder.model import FotModel
from model_worker.recall.reader import Reader


class Readers:
    """Counts who uses a memory; for any thread."""

    def __init__(self, model: FotModel):
        self._model = model
        self._lock = threading.Lock()
        self._open: dict[Memory, Reader] = {}
        self._users: dict[Memory, int] = {}

    def take(self, memory: Memory | None) -> Reader | None:
        """The reader of a memory, until given back; None for the model's own, which is always open."""
        if memory is None or memory is self._model.memory:
            return None
        with self._lock:
            if memory not in self._open:
                self._open[memory] = self._model.reader_of(memory)
            self._users[memory] = self._users.get(memory, 0) + 1
            return self._open[memory]

    def give_back(self, memory: Memory | None) -> None:
        """One user less; after the last one the reader closes. The memory stays its owner's."""
        if memory is None or memory is self._model.memory:
            return
        with self._lock:
            self._users[memory] -= 1
            if self._users[memory]:
                return
            del self._users[memory]
            reader = self._open.pop(memory)
        reader.close()
