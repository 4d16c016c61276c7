"""gRPC where no model is: a server that asks the replicas. Light: it loads nothing of transformers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

from ray import serve

from memory_service.errors import FotError
from memory_service.types.callers import Identity
from model_worker.api.guard import Rules
from model_worker.api.keys import Keys
from model_worker.api.limits import Limits
from model_worker.api.server import Addresses, Server
from model_worker.api.traffic import Traffic
from model_worker.deployment.forwarding import Forwarder

APPLICATION = "fot"
REPLICA = "worker"


class Gateway:
    """The gRPC server, which holds no model."""

    def __init__(self, keys: Path | None, limits: Limits, addresses: Addresses):
        self._rules = Rules(Keys(keys), Traffic(limits.calls), limits.timeout_s)
        self._addresses = addresses
        self._replicas = serve.get_deployment_handle(REPLICA, APPLICATION).options(stream=True, method_name="rpc")
        self._server: Server | None = None

    async def reconfigure(self, settings: dict[str, str]) -> None:
        """Listen: Serve calls this on the event loop that calls run on, before there are any."""
        if self._server is None:
            self._server = Server(None, Forwarder(self._send), self._rules, self._addresses)
            await self._server.start()

    async def address(self) -> str | None:
        """Where it listens."""
        return None if self._server is None else self._server.grpc

    async def __del__(self) -> None:
        """Let calls under way finish."""
        if self._server is not None:
            await self._server.stop()

    async def _send(
        self, rpc: str, identity: Identity, requests: list[bytes], session: str
    ) -> AsyncGenerator[bytes | FotError]:
        replicas = self._replicas.options(session_id=session) if session else self._replicas
        answers = replicas.remote(rpc, identity, requests)
        ended = False
        try:
            async for answer in answers:
                yield answer
            ended = True
        finally:
            if not ended:
                answers.cancel()
