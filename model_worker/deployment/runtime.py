"""This process's place in a Ray cluster: joined by its address, or a small one of this machine for as long as a call.

Whoever can reach a Ray cluster can run code on it, so a cluster started here takes a token that nobody else knows. One
that is joined says itself what it takes; Ray reads RAY_AUTH_MODE and RAY_AUTH_TOKEN, or the token's file.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memory_service.errors import FailedPrecondition, InvalidArgument, Unauthenticated, Unavailable
from model_worker.deployment.local_ray import LocalRay
from model_worker.deployment.plan import NAMESPACE

ADDRESS, TOKEN, MODE, USAGE = "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"
ANY = "auto"  # The cluster that runs on this machine, whichever port it has.
DIAL_S = 5.0
OBJECT_BYTES = 256 << 20  # Of an own cluster: keys and values never cross the object store, texts and figures do.


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster this process belongs to."""

    address: str  # host:port of its head.
    ours: bool  # Started by this call, and gone after it.
    nodes: int
    cpus: float
    gpus: float


def need_ray() -> None:
    """Raise FailedPrecondition, with the remedy, where Ray is not installed."""
    if find_spec("ray") is None:
        raise FailedPrecondition("this needs Ray: pip install 'fot-memory[ray]'", reason="EXTRA_MISSING")


@contextmanager
def connect(address: str | None = None, *, namespace: str = NAMESPACE) -> Iterator[Cluster]:
    """Be part of a cluster: `address`, else RAY_ADDRESS, else one of this machine that ends with the call.

    A process that belongs to a cluster already, as every worker does, stays in it. `address` is host:port, or "auto"
    for the cluster that runs on this machine. Raises FailedPrecondition without Ray or if this process belongs to
    another cluster, InvalidArgument, Unauthenticated, and Unavailable if nobody answers.
    """
    if member():
        yield _member_of(address)
        return
    if address is None and not os.environ.get(ADDRESS):
        with _own(namespace) as cluster:
            yield cluster
        return
    cluster = join(address, namespace=namespace)
    try:
        yield cluster
    finally:
        leave()


def join(address: str | None = None, *, namespace: str = NAMESPACE) -> Cluster:
    """Join a running cluster, for good or until `leave`: `address`, else RAY_ADDRESS, else that of this machine.

    On this machine the one that `fot up` started comes first. Never starts one. Raises as `connect`.
    """
    if member():
        return _member_of(address)
    need_ray()
    wanted = address or os.environ.get(ADDRESS) or ANY
    running = LocalRay.running()
    if wanted == ANY and running is not None:
        wanted = running.address
    if running is not None and wanted == running.address:
        running.show_token()
    if "://" in wanted:
        raise InvalidArgument(
            f"a Ray cluster's address is the host:port of its head, got {wanted!r}: run this on one of its nodes"
        )
    _dial(wanted)
    _init(wanted, namespace)
    return _seen(ours=False)


def leave() -> None:
    """Stop belonging to a cluster; what runs detached stays. Harmless twice."""
    if member():
        import ray

        ray.shutdown()


def member() -> bool:
    """Whether this process belongs to a cluster."""
    # Whoever has not imported Ray, which takes a second, is in no cluster.
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@contextmanager
def _own(namespace: str) -> Iterator[Cluster]:
    """A cluster of this machine, its files in a folder that goes with it."""
    need_ray()
    # A token of its own, unless the caller has decided how clusters are guarded here. Ray remembers a process's token,
    # so it stays.
    if not any(name in os.environ for name in (TOKEN, f"{TOKEN}_PATH", MODE)):
        os.environ[TOKEN] = secrets.token_hex(32)
    # Ray's sockets must have short paths, which a TMPDIR of somebody's choice may not be.
    folder = Path(tempfile.mkdtemp(prefix="fot-ray-", dir="/tmp"))
    try:
        _init(
            "local",
            namespace,
            _temp_dir=str(folder),
            include_dashboard=False,
            object_store_memory=OBJECT_BYTES,
        )
        yield _seen(ours=True)
    finally:
        leave()
        shutil.rmtree(folder, ignore_errors=True)


def _dial(address: str) -> None:
    """Raise InvalidArgument or Unavailable at once for what cannot be a head: Ray itself tries for minutes."""
    if address == ANY:
        return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise InvalidArgument(f"a Ray cluster's address is the host:port of its head, got {address!r}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), DIAL_S):
            pass
    except OSError as error:
        raise Unavailable(f"no Ray cluster answers at {address}: {error}") from None


def _init(address: str, namespace: str, **told: Any) -> None:
    """ray.init, quiet, reporting to nobody, and leaving this process's signals as they are."""
    os.environ.setdefault(USAGE, "0")
    # What a warning of Ray's about idle GPUs asks for; ours name the GPUs they want.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.exceptions import AuthenticationError

    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if here else None
    try:
        ray.init(address, namespace=namespace, logging_level=logging.ERROR, log_to_driver=False, **told)
    except AuthenticationError as error:
        raise Unauthenticated(f"the Ray cluster at {address} does not take our token: {_first(error)}") from None
    except ConnectionError as error:
        raise Unavailable(f"no Ray cluster answers at {address}: {_first(error)}") from None
    except ValueError as error:
        raise InvalidArgument(f"no Ray cluster can be joined at {address}: {_first(error)}") from None
    except Exception as error:  # Ray raises many kinds, plain Exception among them.
        raise Unavailable(f"the Ray cluster at {address} cannot be joined: {_first(error)}") from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _member_of(address: str | None) -> Cluster:
    cluster = _seen(ours=False)
    if address not in (None, ANY, cluster.address):
        raise FailedPrecondition(f"this process belongs to the Ray cluster at {cluster.address}, not {address}")
    return cluster


def _seen(ours: bool) -> Cluster:
    import ray

    everything = ray.cluster_resources()
    return Cluster(
        address=str(ray.get_runtime_context().gcs_address),
        ours=ours,
        nodes=sum(bool(node["Alive"]) for node in ray.nodes()),
        cpus=float(everything.get("CPU", 0)),
        gpus=float(everything.get("GPU", 0)),
    )


def _first(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
