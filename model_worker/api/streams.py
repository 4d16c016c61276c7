"""Server-sent events, and clients that leave: whoever stops listening ends the work, before its first event too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from memory_service.errors import Cancelled
from model_worker.api.problems import problem
from model_worker.api.replies import JsonObject

Told = TypeVar("Told")

DONE = b"data: [DONE]\n\n"
_STILL = b": still at it\n\n"  # A comment: proxies hang up on what is silent.


async def while_listening(receive: Receive, work: Coroutine[Any, Any, Told]) -> Told:
    """What `work` gives; it is cancelled if the client leaves, which raises Cancelled. The request's body is read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client left")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


class EventStream(Response):
    """Chunks of JSON as server-sent events, each as it comes, then [DONE]; an error on the way is the last event."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[JsonObject | None], on_end: Callable[[], None]):
        """`chunks` gives None for a silence. `on_end` is called however the stream ends, begun or not."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the chunks or the client end."""
        try:
            await while_listening(receive, self._send(send))
        except Cancelled:
            pass
        finally:
            self._on_end()
            await self._chunks.aclose()

    async def _send(self, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await write(_STILL if chunk is None else event(chunk))
        except Exception as error:
            # The status is long sent; OpenAI's clients raise what stands under "error".
            await write(event(problem(error)[1]))
        await write(DONE, more=False)


def event(chunk: JsonObject) -> bytes:
    """A chunk as it crosses the wire."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
