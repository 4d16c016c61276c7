"""The process's face: listen, TLS, health, reflection, metrics, and a stop that lets calls finish."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.process.lifetime import in_thread, until_signal
from memory_service.process.logs import event
from memory_service.server.auth import PageTokens, TokenFile
from memory_service.server.interceptors import Guard
from memory_service.server.metrics import Metrics, page
from memory_service.server.rpcs import AnyStore, Service
from memory_service.settings import ServerSettings
from memory_service.wire.codec import SERVICE

READING = "read"  # Health service that stays SERVING while a read-only store still answers.
_HEALTH_PERIOD_S = 0.25
_UNIX = "unix:"


class ServedStore(AnyStore, Protocol):
    """A store that also says how it is."""

    @property
    def ready(self) -> bool: ...

    @property
    def read_only_reason(self) -> str | None: ...

    @property
    def behind(self) -> bool: ...

    def check_epoch(self, epoch: int, reads: bool) -> None: ...


class Server:
    """A gRPC server over a store. It does not own the store: close that after `stop`."""

    def __init__(self, store: ServedStore, settings: ServerSettings):
        check_exposure(settings)
        self.addresses: tuple[str, ...] = ()  # Where it listens, with the ports that were free.
        self.metrics_port: int | None = None
        self.health_address: str | None = None
        self._store = store
        self._settings = settings
        self._metrics = Metrics()
        self._metrics.watch_store(
            lambda: store.ready, lambda: store.read_only_reason is None, lambda: store.behind, settings.data
        )
        tokens = TokenFile(settings.tokens) if settings.tokens else None
        key = tokens.page_key if tokens else secrets.token_bytes(32)
        self._service = Service(store, settings, PageTokens(key), self._metrics)
        self._guard = Guard(tokens, settings.calls, self._metrics, store.check_epoch)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stub lacks it
        self._probed: aio.Server | None = None  # Answers probes, and nothing else.
        self._closing = ExitStack()

    async def start(self) -> None:
        """Listen. Raises FailedPrecondition if an address is taken; then the server is spent."""
        self._server = aio.server(interceptors=[self._guard], options=_options(self._settings.message_bytes))
        try:
            await self._start()
        except BaseException:
            await self._server.stop(None)
            if self._probed is not None:
                await self._probed.stop(None)
            self._service.close()
            self._closing.close()
            raise

    async def _start(self) -> None:
        self._server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._settings.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.addresses = tuple(self._bind(one.strip()) for one in self._settings.listen.split(","))
        if self._settings.metrics:
            host, port = split_address(self._settings.metrics)
            self.metrics_port = self._closing.enter_context(page(self._metrics, host, port))
        if self._settings.health:
            await self._answer_probes(self._settings.health)
        await self._tell_health()
        await self._server.start()
        self._watching = asyncio.create_task(self._watch_health())
        event(logging.INFO, "serving", addresses=", ".join(self.addresses), metrics=self._settings.metrics)

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse new calls, let those under way finish for `drain_grace_s`, then cut them off."""
        event(logging.INFO, "stopping", calls=self._guard.calls)
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self._settings.drain_delay_s)
        self._guard.draining = True
        await self._server.stop(self._settings.drain_grace_s)
        if self._probed is not None:
            await self._probed.stop(None)
        await asyncio.to_thread(self._service.close)
        self._closing.close()
        event(logging.INFO, "stopped")

    async def _answer_probes(self, address: str) -> None:
        """Health on an address of its own: whether the service serves is all that can be learnt there."""
        split_address(address)
        self._probed = aio.server(options=_options(self._settings.message_bytes))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probed)
        self.health_address = _bound(self._probed.add_insecure_port, address)
        await self._probed.start()

    def _bind(self, address: str) -> str:
        if self._settings.tls_certificate and not address.startswith(_UNIX):
            return _bound(self._bind_tls, address)
        bound = _bound(self._server.add_insecure_port, address)
        if address.startswith(_UNIX):
            Path(address.removeprefix(_UNIX)).chmod(0o600)
        return bound

    def _bind_tls(self, address: str) -> int:
        return self._server.add_secure_port(address, _credentials(self._settings))

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            await self._tell_health()

    async def _tell_health(self) -> None:
        ready = self._store.ready
        writable = ready and self._store.read_only_reason is None
        for name, well in (("", writable), (SERVICE, writable), (READING, ready)):
            answer = health_pb2.HealthCheckResponse
            await self._health.set(name, answer.SERVING if well else answer.NOT_SERVING)


async def serve(store: ServedStore, settings: ServerSettings, started: Callable[[Server], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let calls under way finish. `started` is told once it listens."""
    await until_signal(lambda: Server(store, settings), started)


@contextmanager
def running(store: ServedStore, settings: ServerSettings) -> Iterator[str]:
    """A server in a thread of this process while the block runs; gives its address, as "host:port" or "unix:/path"."""
    with in_thread(lambda: Server(store, settings), "fot-server") as server:
        yield server.addresses[0]


# --- Addresses and exposure -----------------------------------------------------------------------------------------


def check_exposure(settings: ServerSettings) -> None:
    """Raise InvalidArgument if other machines could come in without TLS and tokens, unless that is spelt out."""
    if bool(settings.tls_certificate) != bool(settings.tls_key):
        raise InvalidArgument("TLS needs both a certificate and its key")
    if settings.tls_client_ca and not settings.tls_certificate:
        raise InvalidArgument("a client CA needs TLS: give a certificate and its key too")
    for address in (one.strip() for one in settings.listen.split(",")):
        if is_local(address) or settings.insecure:
            continue
        missing = [
            told
            for given, told in (
                (settings.tls_certificate, "TLS (--tls-certificate and --tls-key)"),
                (settings.tokens, "tokens (--tokens, made with `fot token create`)"),
            )
            if not given
        ]
        if missing:
            raise InvalidArgument(
                f"{address} can be reached from other machines, and documents can be read out of keys and values: "
                f"add {' and '.join(missing)}, listen on 127.0.0.1, or say --insecure if the network is trusted"
            )


def is_local(address: str) -> bool:
    """Whether only this machine can reach an address."""
    if address.startswith(_UNIX):
        return True
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port". Raises InvalidArgument."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise InvalidArgument(f"an address is 'host:port' or 'unix:/path', got {address!r}")
    return host.strip("[]"), int(port)


def _bound(bind: Callable[[str], int], address: str) -> str:
    """The address with the port that was free. Raises FailedPrecondition if it is taken."""
    try:
        port = bind(address)
    except RuntimeError as error:
        raise FailedPrecondition(f"cannot listen on {address}; is another service running there?") from error
    return address if address.startswith(_UNIX) else f"{address.rpartition(':')[0]}:{port}"


def _options(message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        # Two services on one port would each get some of the calls.
        ("grpc.so_reuseport", 0),
        # Clients ping every 60 s, those of clusters every 10 s; by default gRPC would hang up on them.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        # Chunks are a megabyte: reading as much at a time makes uploads half as fast again.
        ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
        ("grpc.experimental.tcp_max_read_chunk_size", 4 << 20),
    ]


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials:
    """TLS that takes up changed certificate files at the next connection."""
    assert settings.tls_certificate is not None
    assert settings.tls_key is not None
    files = tuple(path for path in (settings.tls_certificate, settings.tls_key, settings.tls_client_ca) if path)
    seen = _contents(files)

    def configuration(contents: tuple[bytes, ...]) -> grpc.ServerCertificateConfiguration:
        certificate, key, *client_ca = contents
        return grpc.ssl_server_certificate_configuration([(key, certificate)], *client_ca)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            contents = _contents(files)
        except InvalidArgument as error:
            event(logging.ERROR, "keeping the old TLS certificate", error)
            return None
        if contents == seen:
            return None
        seen = contents
        event(logging.INFO, "the TLS certificate changed")
        return configuration(contents)

    fetch: Any = changed  # None means unchanged, which its type does not say.
    return grpc.dynamic_ssl_server_credentials(configuration(seen), fetch, settings.tls_client_ca is not None)


def _contents(files: tuple[Path, ...]) -> tuple[bytes, ...]:
    try:
        return tuple(path.read_bytes() for path in files)
    except OSError as error:
        raise InvalidArgument(f"the TLS file {error.filename} cannot be read: {error.strerror}") from error
