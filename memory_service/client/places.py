"""Where a memory lives: behind one interface, a store in this process or a service elsewhere.

":memory:"            a store in RAM, gone when closed
"./data"              a store in this process over that directory; opened twice, it is shared
"grpc://host:port"    a service on this machine or behind a trusted network
"grpcs://host:port"   a service over TLS
"unix:/path"          a service on this machine's socket
"grpc://a:1,b:2,…"    a cluster: one memory over many services; "?replicas=2" where every two hold the same
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from memory_service.errors import FailedPrecondition, InvalidArgument, NotFound
from memory_service.pieces import cut_attend, join_attended
from memory_service.settings import StoreOptions
from memory_service.types import MAX_QUERIES, Cancel, Identity, Role
from memory_service.verbs import Attend, Verb

if TYPE_CHECKING:
    from memory_service.store.store import Store

Answer = TypeVar("Answer")

TIMEOUT_S = 60.0
IN_MEMORY = ":memory:"
DIRECTORIES = "fot.directories"  # Entry points that make further schemes the targets of clusters.
EMBEDDED = Identity("default", Role.ADMIN)  # Who holds a store in their own process may do everything.


class Place(Protocol):
    """Answers verbs."""

    @property
    def target(self) -> str: ...

    @property
    def remote(self) -> bool:
        """Whether calls cross a network."""
        ...

    def run(self, verb: Verb[Answer], timeout_s: float) -> Answer:
        """Raises `FotError`; DeadlineExceeded after `timeout_s`."""
        ...

    def close(self) -> None: ...


class AsyncPlace(Protocol):
    """Answers verbs without blocking the event loop."""

    @property
    def target(self) -> str: ...

    async def run(self, verb: Verb[Answer], timeout_s: float) -> Answer:
        """Raises `FotError`; DeadlineExceeded after `timeout_s`. Cancelling the task stops the work."""
        ...

    async def close(self) -> None: ...


class LocalPlace:
    """A store in this process. Stores of a directory are shared and closed by the last who lets go."""

    remote = False

    def __init__(self, directory: Path | None, options: StoreOptions | None = None):
        self.target = IN_MEMORY if directory is None else str(directory)
        if directory is None:
            self._store = _open_store(None, options or StoreOptions())
            self._release = weakref.finalize(self, self._store.close)
        else:
            directory = directory.resolve()
            shared = _share(directory, options)
            self._store = shared.store
            self._release = weakref.finalize(self, partial(_let_go, directory, shared))

    def run(self, verb: Verb[Answer], timeout_s: float, cancel: Cancel | None = None) -> Answer:
        """Ask the store in the calling thread."""
        if not self._release.alive:
            raise closed(self.target)
        cancel = cancel or Cancel(timeout_s)
        if isinstance(verb, Attend) and _has_too_many_rows(verb):
            # What a service is asked in several messages, a store takes in several calls.
            messages, calls = cut_attend(verb)
            joined = join_attended(messages, [self._store.run(EMBEDDED, call, cancel) for call in calls])
            return cast(Answer, joined)
        return self._store.run(EMBEDDED, verb, cancel)

    def close(self) -> None:
        """Let go of the store. Harmless twice."""
        self._release()


def _has_too_many_rows(verb: Attend) -> bool:
    shapes = [group.queries.shape for group in verb.groups if group.queries.ndim == 3]
    return any(heads * queries > MAX_QUERIES for heads, queries, _ in shapes)


class AsyncLocalPlace:
    """A store in this process, asked in threads of the loop's executor."""

    def __init__(self, place: LocalPlace):
        self._place = place
        self.target = place.target

    async def run(self, verb: Verb[Answer], timeout_s: float) -> Answer:
        """Ask the store in another thread. Cancelling the task stops the work at its next block."""
        cancel = Cancel(timeout_s)
        try:
            return await asyncio.to_thread(self._place.run, verb, timeout_s, cancel)
        except asyncio.CancelledError:
            cancel.cancel()
            raise

    async def close(self) -> None:
        """Let go of the store. Harmless twice."""
        await asyncio.to_thread(self._place.close)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for TLS: the authority to trust (None: the system's) and a certificate to show, if the service asks."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None  # Expect this name in the service's certificate instead of the host's.


def closed(target: str) -> FailedPrecondition:
    """The error of using what was closed."""
    return FailedPrecondition(f"the connection to {target} was closed; open it again")


# --- Opening --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """A service's address."""

    target: str  # As the caller wrote it.
    authority: str  # As gRPC wants it.
    tls: Tls | None
    token: str | None


@dataclass(frozen=True, slots=True)
class ClusterTarget:
    """A cluster's target, in parts."""

    target: str  # As the caller wrote it.
    scheme: str
    rest: str  # What follows "://".
    tls: Tls | None
    token: str | None


def open_place(
    target: str | Path,
    token: str | Path | None,
    tls: Tls | None,
    insecure: bool,
    options: StoreOptions | None,
    create: bool,
    on_missing: str | None = None,
) -> Place:
    """Open what `target` names, blocking. Raises InvalidArgument for a target that is none of the forms."""
    found = _resolve(target, token, tls, insecure, options)
    if isinstance(found, ClusterTarget):
        from memory_service.cluster.opening import Reach, open_cluster

        reach = Reach(found.target, found.tls, found.token)
        return open_cluster(found.scheme, found.rest, reach, on_missing)
    if isinstance(found, Address):
        # Who keeps a memory in this process needs no gRPC.
        from memory_service.client.remote import RemotePlace

        return RemotePlace(found)
    return LocalPlace(_existing(found, create), options)


async def open_async_place(
    target: str | Path,
    token: str | Path | None,
    tls: Tls | None,
    insecure: bool,
    options: StoreOptions | None,
    create: bool,
    on_missing: str | None = None,
) -> AsyncPlace:
    """Open what `target` names, on the running loop. Raises InvalidArgument for a target that is none of the forms."""
    found = _resolve(target, token, tls, insecure, options)
    if isinstance(found, ClusterTarget):
        from memory_service.cluster.opening import Reach, open_async_cluster

        reach = Reach(found.target, found.tls, found.token)
        return open_async_cluster(found.scheme, found.rest, reach, on_missing)
    if isinstance(found, Address):
        from memory_service.client.remote import AsyncRemotePlace

        return AsyncRemotePlace(found)
    directory = _existing(found, create)
    return AsyncLocalPlace(await asyncio.to_thread(LocalPlace, directory, options))


def cluster_target(target: str, token: str | Path | None, tls: Tls | None, insecure: bool) -> ClusterTarget:
    """A cluster's target, in parts; one address is a cluster of one. Raises InvalidArgument if it is none."""
    found = _resolve(target, token, tls, insecure, None)
    if isinstance(found, Address) and "://" in target:
        scheme, _, rest = target.partition("://")
        return ClusterTarget(target, scheme, rest, found.tls, found.token)
    if not isinstance(found, ClusterTarget):
        raise InvalidArgument(f"{target} is no cluster; write 'grpc://host:port,host:port'")
    return found


def is_cluster(target: str | Path) -> bool:
    """Whether a target names many services. Raises InvalidArgument for a target that is none of the forms."""
    return isinstance(_resolve(target, None, None, False, None), ClusterTarget)


def _resolve(
    target: str | Path, token: str | Path | None, tls: Tls | None, insecure: bool, options: StoreOptions | None
) -> Address | ClusterTarget | Path | None:
    """An address, a cluster, a directory, or None for RAM."""
    text = str(target)
    scheme, _, rest = text.partition("://")
    other = isinstance(target, str) and rest and scheme not in ("grpc", "grpcs") and _is_cluster_scheme(scheme)
    remote = other or (scheme in ("grpc", "grpcs") and bool(rest)) or text.startswith("unix:")
    if isinstance(target, Path) or not (remote or "://" in text):
        if tls is not None:
            raise InvalidArgument(f"tls is for services; {text} is in this process")
        if not text:
            raise InvalidArgument("the target is empty; give ':memory:', a directory or 'grpc://host:port'")
        return None if text == IN_MEMORY else Path(text)
    if not remote:
        raise InvalidArgument(
            f"cannot open {text!r}; give ':memory:', a directory, 'grpc[s]://host:port' or 'unix:path'"
        )
    if options is not None:
        raise InvalidArgument(f"options are for stores in this process; {text} has its own settings")
    if tls is not None and scheme != "grpcs" and not other:
        raise InvalidArgument(f"tls was given for {text}; write grpcs:// to use it")
    credential = _credential(token)
    if other or (not text.startswith("unix:") and ("," in rest or "?" in rest)):
        far = [one for one in rest.partition("?")[0].split(",") if not _is_loopback(one)]
        if credential and scheme == "grpc" and not insecure and far:
            raise _in_clear(far[0])
        secured = (tls or Tls()) if scheme == "grpcs" else tls
        return ClusterTarget(text, scheme, rest, secured, credential)
    authority = text if text.startswith("unix:") else rest.rstrip("/")
    if credential and scheme == "grpc" and not insecure and not _is_loopback(authority):
        raise _in_clear(authority)
    return Address(text, authority, (tls or Tls()) if scheme == "grpcs" else None, credential)


def _in_clear(authority: str) -> InvalidArgument:
    return InvalidArgument(
        f"a token would travel to {authority} unencrypted; use grpcs://, or insecure=True on a network you trust"
    )


def _is_cluster_scheme(scheme: str) -> bool:
    return bool(entry_points(group=DIRECTORIES, name=scheme))


def _credential(token: str | Path | None) -> str | None:
    if token is None:
        named = os.environ.get("FOT_TOKEN_FILE")
        token = Path(named) if named else os.environ.get("FOT_TOKEN")
    if isinstance(token, Path):
        try:
            token = token.read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidArgument(f"the token file {token} cannot be read: {error.strerror}") from None
    return token.strip() or None if token else None


def _is_loopback(authority: str) -> bool:
    host = authority.rpartition(":")[0] if not authority.endswith("]") else authority
    return host in ("localhost", "[::1]") or host.startswith("127.")


def _existing(directory: Path | None, create: bool) -> Path | None:
    if directory is not None and not create and not directory.is_dir():
        raise NotFound(f"there is no directory {directory}; give a spec to create a memory in it")
    return directory


# --- Stores shared within the process -------------------------------------------------------------------------------


class _Shared:
    def __init__(self, store: Store, options: StoreOptions | None):
        self.store = store
        self.options = options
        self.holders = 0


# A directory has one owner at a time, so those in one process must find each other. Re-entrant because a holder may be
# collected, and so let go, while another is being opened in the same thread.
_shared: dict[Path, _Shared] = {}
_shared_lock = threading.RLock()


def _share(directory: Path, options: StoreOptions | None) -> _Shared:
    with _shared_lock:
        shared = _shared.get(directory)
        if shared is None:
            shared = _shared[directory] = _Shared(_open_store(directory, options or StoreOptions()), options)
        shared.holders += 1
    if options is not None and options != shared.options:
        _let_go(directory, shared)
        raise FailedPrecondition(f"{directory} is already open in this process with other options")
    return shared


def _let_go(directory: Path, shared: _Shared) -> None:
    with _shared_lock:
        shared.holders -= 1
        if shared.holders == 0:
            del _shared[directory]
            shared.store.close()


def _open_store(directory: Path | None, options: StoreOptions) -> Store:
    # Who talks to a service needs neither the store nor Faiss.
    from memory_service.store.store import Store

    return Store.open(directory, options)
