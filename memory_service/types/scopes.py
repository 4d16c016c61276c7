"""What a query may see."""

from __future__ import annotations

from dataclasses import dataclass

from memory_service.types.conditions import Filter


@dataclass(frozen=True, slots=True)
class SessionScope:
    """A session a query may see; `until` hides tokens at or after that offset."""

    id: str
    until: int | None = None
    at_least: int = 0  # SessionExpired if the layer holds fewer tokens: the process missed an append.


@dataclass(frozen=True, slots=True)
class Scope:
    """Which tokens of a memory a query may see: documents (by id, by filter, or all) and sessions."""

    documents: tuple[str, ...] | None = None  # None: all documents; (): none.
    where: Filter | None = None  # Narrows `documents`.
    sessions: tuple[SessionScope, ...] = ()

    @staticmethod
    def session(*ids: str) -> Scope:
        """Only these sessions, no documents."""
        return Scope(documents=(), sessions=tuple(SessionScope(one) for one in ids))
