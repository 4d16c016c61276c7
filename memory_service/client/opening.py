"""Opens what a target names: a place in this process, a service, or a cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path

from memory_service.errors import NotFound
from memory_service.places.local import AsyncLocalPlace, LocalPlace
from memory_service.places.place import AsyncPlace, Place
from memory_service.places.targets import Address, ClusterTarget, Tls, resolve
from memory_service.settings import StoreOptions

TIMEOUT_S = 60.0


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
    found = resolve(target, token, tls, insecure, options)
    if isinstance(found, ClusterTarget):
        from memory_service.cluster.opening import Reach, open_cluster

        reach = Reach(found.target, found.tls, found.token)
        return open_cluster(found.scheme, found.rest, reach, on_missing)
    if isinstance(found, Address):
        # Who keeps a memory in this process needs no gRPC.
        from memory_service.places.remote import RemotePlace

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
    found = resolve(target, token, tls, insecure, options)
    if isinstance(found, ClusterTarget):
        from memory_service.cluster.opening import Reach, open_async_cluster

        reach = Reach(found.target, found.tls, found.token)
        return open_async_cluster(found.scheme, found.rest, reach, on_missing)
    if isinstance(found, Address):
        from memory_service.places.remote import AsyncRemotePlace

        return AsyncRemotePlace(found)
    directory = _existing(found, create)
    return AsyncLocalPlace(await asyncio.to_thread(LocalPlace, directory, options))


def _existing(directory: Path | None, create: bool) -> Path | None:
    if directory is not None and not create and not directory.is_dir():
        raise NotFound(f"there is no directory {directory}; give a spec to create a memory in it")
    return directory
