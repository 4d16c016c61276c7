"""How a client treats a cluster, and how a target says so: "grpc://a:1,b:2,c:3,d:4?replicas=2&on_missing=degrade"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import parse_qsl

from memory_service.errors import InvalidArgument
from memory_service.shards import MAX_REPLICAS, Shard, ShardMap


class OnMissing(StrEnum):
    """What an attention does when no replica of a shard in its scope can be reached."""

    FAIL = "fail"  # Unavailable, naming the shards.
    DEGRADE = "degrade"  # Answer from the others; coverage says what was left out.


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """How a client treats a cluster. Times in seconds."""

    replicas: int = 1  # Of every shard of a cluster that was told no map yet: so many addresses in a row.
    on_missing: OnMissing = OnMissing.FAIL
    write_quorum: int = 0  # Replicas that must have a change before it is acknowledged; 0: half, rounded up.
    hedge_s: float | None = None  # A read that takes longer is asked of another replica too; None: never.
    patience_s: float = 10.0  # How long a shard that cannot be reached is tried: longer than it takes to restart.

    def quorum(self, replicas: int) -> int:
        """Replicas of a shard of so many that must have a change.

        Half, rounded up: with two replicas one may be dead, which a majority would not survive.
        """
        return min(replicas, self.write_quorum or (replicas + 1) // 2)


def cut_target(rest: str) -> tuple[tuple[str, ...], ClusterOptions]:
    """Authorities and options of what follows "grpc://". Raises InvalidArgument saying what is wrong."""
    listed, _, query = rest.partition("?")
    authorities = tuple(one.strip().rstrip("/") for one in listed.split(","))
    if not all(authorities):
        raise InvalidArgument(f"an address is missing in {rest!r}; write 'grpc://host:port,host:port'")
    if len(set(authorities)) != len(authorities):
        raise InvalidArgument(f"an address stands twice in {rest!r}; a process is one replica of one shard")
    options = _options(query)
    if len(authorities) % options.replicas:
        raise InvalidArgument(f"{len(authorities)} addresses cannot be shards of {options.replicas} replicas each")
    return authorities, options


def layout_of(authorities: Sequence[str], replicas: int) -> ShardMap:
    """The first map of a cluster: every `replicas` addresses in a row are a shard."""
    runs = [tuple(authorities[first : first + replicas]) for first in range(0, len(authorities), replicas)]
    return ShardMap(1, tuple(Shard(f"s{number}", run) for number, run in enumerate(runs)))


def _options(query: str) -> ClusterOptions:
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise InvalidArgument(f"cannot read the options {query!r}; write '?replicas=2&on_missing=degrade'") from None
    known = {"replicas", "on_missing", "write_quorum", "hedge_ms"}
    if unknown := sorted(given.keys() - known):
        raise InvalidArgument(f"a cluster has no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    replicas = _number(given, "replicas", 1, MAX_REPLICAS, 1)
    quorum = _number(given, "write_quorum", 1, replicas, 0)
    hedge_ms = _number(given, "hedge_ms", 1, 60_000, 0)
    return ClusterOptions(
        replicas=replicas,
        on_missing=on_missing_of(given.get("on_missing", OnMissing.FAIL)),
        write_quorum=quorum,
        hedge_s=hedge_ms / 1000 if hedge_ms else None,
    )


def on_missing_of(text: str) -> OnMissing:
    """The word a caller wrote. Raises InvalidArgument."""
    try:
        return OnMissing(text)
    except ValueError:
        raise InvalidArgument(f"on_missing is fail or degrade, got {text!r}") from None


def _number(given: dict[str, str], name: str, low: int, high: int, default: int) -> int:
    text = given.get(name)
    if text is None:
        return default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise InvalidArgument(f"{name} must be {low} to {high}, got {text!r}")
    return int(text)
