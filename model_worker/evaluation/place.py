"""Where a study keeps its memories: in this process, a directory, or a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memory_service import Client, StoreOptions, Tls


@dataclass(frozen=True, slots=True)
class Place:
    """A target, and how to get in."""

    target: str = ":memory:"
    token: str | Path | None = None  # Itself, or its file.
    tls: Tls | None = None
    insecure: bool = False
    timeout_s: float = 600.0

    @property
    def remote(self) -> bool:
        """Whether a service elsewhere answers."""
        return "://" in self.target or self.target.startswith("unix:")

    def open(self, resident_bytes: int | None = None) -> Client:
        """A store in this process keeps up to `resident_bytes` of keys and values in RAM, by default its usual share.

        Raises Unavailable and what `Client.open` raises.
        """
        own = None if self.remote or resident_bytes is None else StoreOptions(resident_bytes=resident_bytes)
        return Client.open(
            self.target, token=self.token, tls=self.tls, insecure=self.insecure, timeout_s=self.timeout_s, options=own
        )
