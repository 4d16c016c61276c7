"""Typed settings with units and defaults. Only the CLI reads them from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What a store may use. Sizes in bytes, times in seconds."""

    resident_bytes: int = 2 * GIB  # RAM for hot keys and values; colder documents are read from disk.
    session_bytes: int = 8 * GIB  # RAM for all sessions together.
    staging_bytes: int = 512 * MIB  # RAM for small documents on their way in.
    tenant_bytes: int | None = None  # Committed bytes a tenant may hold; None: no limit.
    tenant_sessions: int = 1024  # Open sessions a tenant may hold.
    tenant_memories: int = 1024  # Memories a tenant may hold.
    tenant_snapshots: int = 1024  # Snapshots a tenant may hold.
    upload_lease_s: float = 600.0  # An upload nobody writes to is dropped after this.
    max_lease_s: float = 86_400.0  # The longest session lease.
    scratch_bytes: int = 64 * MIB  # Working memory of one attend; more queries at once need more passes.
    device: str = "cpu"  # Where hot keys live and attention runs: "cpu", "cuda", "cuda:1", …
    background: bool = True  # Build indexes and compact without being asked.
    snapshots: Path | None = None  # Directory of all snapshots; None: "snapshots" in the data directory.
    begin_from_snapshots: bool = False  # A directory without a catalogue begins with the newest ones, not empty.
    begin_from_shard: str = ""  # Whose, where the directory holds several shards' snapshots.


class ServerSettings(BaseSettings):
    """How the service listens, protects itself and shares out the machine. Sizes in bytes, times in seconds.

    Each field is read from the environment as FOT_<NAME>, those of `store` as FOT_STORE__<NAME>, unless given.
    """

    model_config = SettingsConfigDict(env_prefix="FOT_", env_nested_delimiter="__", frozen=True, extra="forbid")

    data: Path | None = None  # Directory of everything durable; None: all in RAM, gone when the service stops.
    store: StoreOptions = StoreOptions()

    # Who may connect.
    listen: str = "127.0.0.1:7070"  # "host:port" (port 0: any free) or "unix:/path"; several are joined by commas.
    tls_certificate: Path | None = None  # PEM chain. Changed files are picked up by new connections.
    tls_key: Path | None = None  # PEM key of the certificate.
    tls_client_ca: Path | None = None  # PEM: clients must then show a certificate signed by it.
    tokens: Path | None = None  # The file `fot token` keeps; None: every caller is the admin of one tenant.
    insecure: bool = False  # Serve other machines without TLS or tokens.
    reflection: bool = True  # Tell tools such as grpcurl what can be asked.

    # What a call may take.
    message_bytes: int = Field(8 * MIB, ge=2 * MIB, le=64 * MIB)
    default_timeout_s: float = Field(60.0, gt=0)  # Of a call that brings no deadline.
    max_timeout_s: float = Field(3600.0, gt=0)  # However late its deadline is.
    stream_idle_s: float = Field(60.0, gt=0)  # An upload stream that sends nothing is ended after this.

    # How many calls run at once, and how many wait; beyond, the answer is RESOURCE_EXHAUSTED, at once.
    attend_threads: int = Field(0, ge=0, le=1024)  # Attention, search, fetch and sessions. 0: one a core.
    ingest_threads: int = Field(32, ge=1, le=1024)  # Commits and deletes; most of the time they wait for the disk.
    upload_threads: int = Field(4, ge=1, le=256)  # Chunks on their way to the disk.
    admin_threads: int = Field(4, ge=1, le=256)  # Listings, statistics, operations.
    queue: int = Field(256, ge=0)  # Calls of each kind that wait for a thread.
    uploads: int = Field(256, ge=1)  # Upload streams open at once.
    calls: int = Field(4096, ge=1)  # Calls of any kind under way.
    attend_bytes: int = Field(GIB, ge=MIB)  # Requests, answers and scratch of attention under way.
    ingest_bytes: int = Field(GIB, ge=MIB)  # Requests of documents under way, upload streams included.

    # Watching and stopping.
    metrics: str | None = None  # "host:port" of the Prometheus page /metrics; None: no page.
    health: str | None = None  # "host:port" of gRPC health and nothing else, without TLS: a kubelet's probes know none.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    drain_delay_s: float = Field(0.0, ge=0)  # Between saying NOT_SERVING and refusing calls, for load balancers.
    drain_grace_s: float = Field(30.0, ge=0)  # For calls under way, before they are cut off.
