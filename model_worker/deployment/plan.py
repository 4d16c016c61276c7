"""What is asked of a Ray cluster, and what its actors say of themselves. Light: keepers load nothing else of ours."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

NAMESPACE = "fot"  # Of all our actors, whatever the driver's.
NODE = "{node}"  # In the data directory: the name of the node.


@dataclass(frozen=True, slots=True)
class Security:
    """Files, by the same path on every node; their contents never pass through Ray."""

    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    ca: str | None = None  # Whom the overseer trusts; None: the system's.
    tokens: str | None = None  # What `fot token` keeps.
    token_files: tuple[str, ...] = ()  # An admin's token of every tenant whose memories are kept whole.
    insecure: bool = False  # Serve other machines without TLS or tokens.

    @property
    def network(self) -> bool:
        """Whether services listen on their node's address, not on 127.0.0.1."""
        return self.insecure or bool(self.tls_certificate and self.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One memory over N shards of R services each."""

    name: str
    shards: int
    replicas: int
    data: str  # A directory on every node.
    security: Security = Security()
    snapshots: str | None = None  # A directory that all nodes share; None: each service's own, lost with its disk.
    settings: tuple[tuple[str, str], ...] = ()  # Of the services' environment.
    gpus: float = 0.0  # Of each service.
    replace_after_s: float = 30.0  # A copy whose node is gone is made anew elsewhere after this.
    heal_every_s: float = 60.0
    hung_after_s: float = 60.0  # A service that does not say so long that it lives is killed and started again.

    def directory(self, node: str) -> Path:
        """Where services on a node of that name keep their data."""
        return Path(self.data.replace(NODE, node)).expanduser() / self.name


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """One of the services that hold a shard."""

    shard: int
    replica: int

    @property
    def shard_id(self) -> str:
        """As the shard map has it."""
        return f"s{self.shard}"

    def __str__(self) -> str:
        return f"s{self.shard}-{self.replica}"


class Start(Enum):
    """How a copy begins whose data no node has."""

    NOT = "not"  # Its shard is gone with what it held, until somebody gives that up.
    EMPTY = "empty"  # It is new, or a replica fills it.
    SNAPSHOTS = "snapshots"  # With the newest snapshots; empty where there are none.


@dataclass(frozen=True, slots=True)
class Report:
    """What a keeper says of its service."""

    node: str  # Ray's id.
    node_name: str
    directory: str
    address: str  # "host:port"; empty: it does not serve now.
    pid: int
    starts: int
    problem: str  # Why it does not serve.


@dataclass(frozen=True, slots=True)
class CopyState:
    """How one copy is."""

    copy: Copy
    report: Report | None  # None: nobody keeps it now.
    problem: str  # What must be known of it; empty: nothing.


@dataclass(frozen=True, slots=True)
class ClusterState:
    """How a cluster is, as its overseer sees it."""

    plan: Plan
    pid: int  # Of the overseer.
    shards: int  # That are wanted.
    epoch: int  # Of the shard map; 0: there is none yet.
    copies: tuple[CopyState, ...]
    doing: str  # What it is busy with, with figures; empty: nothing.
    problem: str  # What keeps it from what is wanted; empty: nothing.

    @property
    def ready(self) -> bool:
        """Whether every copy wanted is there, complete, and in the map, and nothing is under way."""
        return not (self.doing or self.problem or any(one.problem for one in self.copies)) and self.epoch > 0


def overseer_name(cluster: str) -> str:
    """The name of a cluster's overseer among actors."""
    return f"{cluster}/overseer"


def keeper_name(cluster: str, copy: Copy) -> str:
    """The name of a copy's keeper among actors."""
    return f"{cluster}/{copy}"
