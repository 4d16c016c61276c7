"""The servers: HTTP and gRPC on one event loop, and a stop that lets answers finish. Knows no model."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import uvicorn
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.types import ASGIApp

from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.process.logs import event
from memory_service.server.server import is_local, split_address
from model_worker.api.guard import Guard, Rules
from model_worker.api.limits import MIB
from model_worker.api.policy import SERVICE
from model_worker.v1 import model_worker_pb2_grpc as pb_grpc

MESSAGE_BYTES = 8 * MIB
_IDLE_S = 75


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where to listen, "host:port" with port 0 for any that is free; None: not at all."""

    http: str | None = "127.0.0.1:8000"
    grpc: str | None = "127.0.0.1:50051"
    tls_certificate: Path | None = None  # PEM chain.
    tls_key: Path | None = None  # PEM.
    insecure: bool = False  # Serve other machines without TLS or keys.
    drain_grace_s: float = 30.0  # For calls under way, before they are cut off.

    def check(self, keys: bool) -> None:
        """Raise InvalidArgument if other machines could come in without TLS and keys, unless that is spelt out."""
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise InvalidArgument("TLS needs both a certificate and its key")
        if self.http is None and self.grpc is None:
            raise InvalidArgument("nothing to listen on: give an address for HTTP, gRPC or both")
        missing = [] if self.tls_certificate else ["TLS (--tls-certificate and --tls-key)"]
        missing += [] if keys else ["API keys (--keys)"]
        for address in (self.http, self.grpc):
            if address is not None and missing and not self.insecure and not is_local(address):
                raise InvalidArgument(
                    f"{address} can be reached from other machines, and whoever reaches it may read and write "
                    f"documents: add {' and '.join(missing)}, listen on 127.0.0.1, or say --insecure if the network "
                    "is trusted"
                )

    def check_files(self) -> None:
        """Raise InvalidArgument unless the files of TLS are on this machine."""
        for path in (self.tls_certificate, self.tls_key):
            if path is not None and not path.is_file():
                raise InvalidArgument(f"there is no TLS file {path}")


class Server:
    """An app over HTTP and rpcs over gRPC. It does not own what is behind them: close that after `stop`."""

    def __init__(self, app: ASGIApp | None, rpcs: Any, rules: Rules, addresses: Addresses):
        """`rpcs` has the methods of `Rpcs`. Raises InvalidArgument for addresses that must not be served."""
        addresses.check(rules.keys.asked)
        addresses.check_files()
        self.http: str | None = None  # Where it listens, with the ports that were free.
        self.grpc: str | None = None
        self.traffic = rules.traffic
        self._addresses = addresses
        self._app = app
        self._rpcs = rpcs
        self._guard = Guard(rules)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stub lacks it
        self._uvicorn: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self._grpc_server: aio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises FailedPrecondition if an address is taken; then the server is spent."""
        try:
            if self._addresses.http is not None and self._app is not None:
                await self._start_http(self._app, self._addresses.http)
            if self._addresses.grpc is not None:
                await self._start_grpc(self._addresses.grpc)
        except BaseException:
            await self.stop()
            raise
        event(logging.INFO, "serving", http=self.http, grpc=self.grpc)

    async def stop(self) -> None:
        """Refuse new calls, let those under way finish for `drain_grace_s`, then cut them off."""
        event(logging.INFO, "stopping", calls=self.traffic.calls)
        self.traffic.draining = True
        await self._health.enter_graceful_shutdown()
        grace_s = self._addresses.drain_grace_s
        if self._uvicorn is not None and self._serving is not None:
            until = asyncio.get_running_loop().time() + grace_s
            # While calls are under way, /health still tells a load balancer to look elsewhere.
            while self.traffic.calls and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(0.02)
            self._uvicorn.should_exit = True
        if self._grpc_server is not None:
            await self._grpc_server.stop(grace_s)
        if self._serving is not None:
            await self._serving
        event(logging.INFO, "stopped")

    async def _start_http(self, app: ASGIApp, address: str) -> None:
        listening = _bound(address)
        self.http = f"{address.rpartition(':')[0]}:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=1,  # The drain comes before; what is left then has had its time.
            ssl_certfile=self._addresses.tls_certificate,
            ssl_keyfile=self._addresses.tls_key,
        )
        self._uvicorn = _Uvicorn(config)
        self._serving = asyncio.create_task(self._uvicorn.serve([listening]))
        while not self._uvicorn.started:
            if self._serving.done():
                await self._serving
                raise FailedPrecondition(f"cannot serve HTTP on {address}; the log says why")
            await asyncio.sleep(0.005)

    async def _start_grpc(self, address: str) -> None:
        server = self._grpc_server = aio.server(interceptors=[self._guard], options=_options())
        pb_grpc.add_ModelWorkerServicer_to_server(self._rpcs, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        split_address(address)
        try:
            port = self._bind_grpc(server, address)
        except RuntimeError as error:
            raise FailedPrecondition(f"cannot listen on {address}; is another service running there?") from error
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        self.grpc = f"{address.rpartition(':')[0]}:{port}"

    def _bind_grpc(self, server: aio.Server, address: str) -> int:
        certificate, key = self._addresses.tls_certificate, self._addresses.tls_key
        if certificate is None or key is None:
            return server.add_insecure_port(address)
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
        return server.add_secure_port(address, credentials)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: the gRPC server beside it stops with the same one."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _bound(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise FailedPrecondition(f"cannot listen on {address}: {error.strerror}") from error


def _options() -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        # Two services on one port would each get some of the calls.
        ("grpc.so_reuseport", 0),
        # A client that is gone without a word holds a session: ask it.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ]
