"""What every HTTP request passes: who asks, is there room, how long may its body be. Strangers' bodies are not read."""

from __future__ import annotations

from collections import deque

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memory_service.errors import FotError, ResourceExhausted
from model_worker.api.keys import Keys
from model_worker.api.problems import problem, problem_response
from model_worker.api.traffic import Traffic

OPEN = ("/health",)  # Needs no key.


class Gate:
    """Lets a request through to the app with its identity in `scope["state"]`, or ends it with the reason why not."""

    def __init__(self, app: ASGIApp, keys: Keys, traffic: Traffic, body_bytes: int):
        self._app = app
        self._keys = keys
        self._traffic = traffic
        self._body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "websocket":
            return  # There are none here.
        if scope["type"] == "lifespan" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            scope.setdefault("state", {})["identity"] = self._keys.identity(headers.get("authorization", ""))
            # The path of a request that nobody serves may be anything: metrics must not keep it.
            with self._traffic.call("http") as call:

                async def noted(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        call.outcome = str(message["status"])
                    await send(message)

                try:
                    body = await self._body(receive, headers)
                except FotError as error:
                    call.outcome = str(problem(error)[0])
                    raise
                await self._app(scope, _replayed(body, receive), noted)
        except FotError as error:
            await problem_response(error)(scope, receive, send)

    async def _body(self, receive: Receive, headers: Headers) -> deque[Message]:
        """All of the request's body; it is at most `body_bytes` long."""
        announced = headers.get("content-length", "0")
        size = int(announced) if announced.isdecimal() else 0
        parts: deque[Message] = deque()
        while True:
            if size > self._body_bytes:
                raise ResourceExhausted(f"a request has at most {self._body_bytes} bytes", reason="REQUEST_TOO_LARGE")
            part = await receive()
            parts.append(part)
            if part["type"] != "http.request" or not part.get("more_body"):
                return parts
            size = max(size, sum(len(one.get("body", b"")) for one in parts))


def _replayed(parts: deque[Message], receive: Receive) -> Receive:
    async def again() -> Message:
        return parts.popleft() if parts else await receive()

    return again
