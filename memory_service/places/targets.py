"""What a target means, and how to reach it. Nothing is opened here.

":memory:"            a store in RAM, gone when closed
"./data"              a store in this process over that directory; opened twice, it is shared
"grpc://host:port"    a service on this machine or behind a trusted network
"grpcs://host:port"   a service over TLS
"unix:/path"          a service on this machine's socket
"grpc://a:1,b:2,…"    a cluster: one memory over many services; "?replicas=2" where every two hold the same
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from memory_service.errors import InvalidArgument
from memory_service.settings import StoreOptions

IN_MEMORY = ":memory:"
DIRECTORIES = "fot.directories"  # Entry points that make further schemes the targets of clusters.


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for TLS: the authority to trust (None: the system's) and a certificate to show, if the service asks."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None  # Expect this name in the service's certificate instead of the host's.


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


def cluster_target(target: str, token: str | Path | None, tls: Tls | None, insecure: bool) -> ClusterTarget:
    """A cluster's target, in parts; one address is a cluster of one. Raises InvalidArgument if it is none."""
    found = resolve(target, token, tls, insecure, None)
    if isinstance(found, Address) and "://" in target:
        scheme, _, rest = target.partition("://")
        return ClusterTarget(target, scheme, rest, found.tls, found.token)
    if not isinstance(found, ClusterTarget):
        raise InvalidArgument(f"{target} is no cluster; write 'grpc://host:port,host:port'")
    return found


def is_cluster(target: str | Path) -> bool:
    """Whether a target names many services. Raises InvalidArgument for a target that is none of the forms."""
    return isinstance(resolve(target, None, None, False, None), ClusterTarget)


def resolve(
    target: str | Path, token: str | Path | None, tls: Tls | None, insecure: bool, options: StoreOptions | None
) -> Address | ClusterTarget | Path | None:
    """An address, a cluster, a directory, or None for RAM.

    Raises InvalidArgument for what is none of the forms, and before a token would travel in clear.
    """
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
