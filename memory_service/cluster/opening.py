"""Clusters by target: a list of addresses, or a scheme that an installed package knows.

A package makes "ray://name" a target by an entry point "ray" in the group "fot.directories": a function that takes what
follows "ray://" and the way to connect (`Reach`), and gives a `Directory` and the `ClusterOptions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points

from memory_service.cluster.directory import Directory, Seeds
from memory_service.cluster.options import ClusterOptions, cut_target, on_missing_of
from memory_service.cluster.place import IMPATIENT, AsyncClusterPlace, ClusterPlace, Lines
from memory_service.errors import InvalidArgument
from memory_service.places.remote import Line
from memory_service.places.targets import DIRECTORIES, Address, Tls


@dataclass(frozen=True, slots=True)
class Reach:
    """How to reach the processes of a cluster."""

    target: str  # As the caller wrote it.
    tls: Tls | None
    token: str | None

    def address(self, authority: str) -> Address:
        """Where and how to connect to one of them."""
        return Address(authority, authority, self.tls, self.token)


DirectoryOf = Callable[[str, Reach, Lines], tuple[Directory, ClusterOptions]]


def open_cluster(scheme: str, rest: str, reach: Reach, on_missing: str | None) -> ClusterPlace:
    """Open a cluster, blocking. Raises InvalidArgument for a target that names none."""
    directory, lines, options = directory_of(scheme, rest, reach, on_missing)
    return ClusterPlace(directory, lines, options)


def open_async_cluster(scheme: str, rest: str, reach: Reach, on_missing: str | None) -> AsyncClusterPlace:
    """Open a cluster for asyncio. Raises InvalidArgument for a target that names none."""
    directory, lines, options = directory_of(scheme, rest, reach, on_missing)
    return AsyncClusterPlace(directory, lines, reach.address, options)


def directory_of(
    scheme: str, rest: str, reach: Reach, on_missing: str | None = None, line: Line = IMPATIENT
) -> tuple[Directory, Lines, ClusterOptions]:
    """Who knows the cluster's shards, the connections to them, and what the target says besides."""
    lines = Lines(reach.address, line)
    directory: Directory
    if scheme in ("grpc", "grpcs"):
        authorities, options = cut_target(rest)
        directory = Seeds(reach.target, authorities, options.replicas, lines.place)
    else:
        directory, options = _directory_of(scheme)(rest, reach, lines)
    if on_missing is not None:
        options = replace(options, on_missing=on_missing_of(on_missing))
    return directory, lines, options


def _directory_of(scheme: str) -> DirectoryOf:
    for entry in entry_points(group=DIRECTORIES, name=scheme):
        try:
            return entry.load()  # type: ignore[no-any-return]  # what the group promises
        except ImportError as error:
            raise InvalidArgument(f"{scheme}:// targets need a package that is missing: {error.name}") from error
    raise InvalidArgument(f"no installed package knows {scheme}:// targets")
