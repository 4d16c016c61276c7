"""Snapshots: a memory as it was at one moment."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from memory_service.errors import InvalidArgument
from memory_service.types.names import check_name

MAX_HOLD_S = 30.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A memory as it was at one moment, in files of its own."""

    id: str
    memory: str  # The memory's name then; empty if `problem` keeps it from being known.
    created_at: float  # Seconds since the epoch.
    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # Of its files; those it shares with the memory or with other snapshots are counted too.
    shard: str = ""  # Of a cluster's memory: the shard it was taken of; empty where all its shards are told together.
    shards: tuple[str, ...] = ()  # The shards of the map then, by id; none if the process belonged to no cluster.
    missing: tuple[str, ...] = ()  # Of `shards`, those whose part of the snapshot was not found.
    problem: str = ""  # Why it cannot be restored, as far as its description tells.


def check_hold(seconds: float) -> None:
    """Raise InvalidArgument unless writers may be held so long."""
    if not 0 <= seconds <= MAX_HOLD_S:
        raise InvalidArgument(f"writers can be held for 0 to {MAX_HOLD_S:.0f} seconds, got {seconds:g}")


def check_snapshot_id(snapshot: str) -> None:
    """Raise InvalidArgument unless it can be a snapshot's id."""
    check_name(snapshot, "a snapshot's id")


def fresh_snapshot_id() -> str:
    """A fresh id of a snapshot; ids sort by the time they were made."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(4)
