"""An answer on the event loop: the worker's thread calls, a task listens, and who stops listening ends the work."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from memory_service.errors import Cancelled
from model_worker.api.tenants import worker_fault
from model_worker.serving.requests import Event, Failed, Finish, Finished, Generates, Request, Text


class Answer:
    """The events of one request. Leaving the `with` before the last frees what the request holds."""

    def __init__(self, generates: Generates, request: Request):
        """Submit; raises what `Generates.submit` does."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ticket = generates.submit(request, self._tell)

    async def next(self) -> Text | Finished:
        """The next piece of text, or the end. Raises what went wrong."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise worker_fault(event.error)
        if isinstance(event, Finished) and event.reason is Finish.CANCELLED:
            raise Cancelled("the answer was cancelled")
        return event

    def close(self) -> None:
        """End the request. Harmless once it has ended."""
        self._ticket.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, event: Event) -> None:
        # A loop that is closed has nobody who listens.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
