"""How requests end: what they held is freed, their sources looked up and their last event told, while others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from memory_service import Memory
from model_worker.serving.job import Job
from model_worker.serving.readers import Readers
from model_worker.serving.requests import Finish

_LOG = logging.getLogger(__name__)
_THREADS = 4


class Goodbyes:
    """Does in threads of its own what may have to ask a memory."""

    def __init__(self, readers: Readers):
        self._readers = readers
        self._threads = ThreadPoolExecutor(_THREADS, "fot-goodbye")
        self.finished = self.cancelled = self.failed = 0

    def say(self, job: Job, close: Callable[[], None] | None, why: Finish | Exception, *, begun: bool = True) -> None:
        """Free what a request held, then tell its end. `close` None: it is kept; not `begun`: it had no reader."""
        if isinstance(why, Exception):
            self.failed += 1
        elif why is Finish.CANCELLED:
            self.cancelled += 1
        else:
            self.finished += 1

        def run() -> None:
            try:
                if close is not None:
                    close()
                    if begun:
                        self._readers.give_back(job.memory)
                if isinstance(why, Exception):
                    job.fail(why)
                else:
                    job.finish(why)
            except Exception:  # Of a listener, or of closing: there is nobody left to tell.
                _LOG.exception("a request did not end well")

        self._threads.submit(run)

    def let_go(self, close: Callable[[], None], memory: Memory | None) -> None:
        """Nobody goes on from what this closes."""

        def run() -> None:
            try:
                close()
                self._readers.give_back(memory)
            except Exception:
                _LOG.exception("a conversation did not end well")

        self._threads.submit(run)

    def close(self) -> None:
        """Wait for all of them."""
        self._threads.shutdown(wait=True)
