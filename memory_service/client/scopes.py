"""Scopes built from what callers have at hand: document ids, sessions, filters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from memory_service.errors import InvalidArgument
from memory_service.filters import Where, filter_of
from memory_service.types.conditions import AllOf
from memory_service.types.scopes import Scope, SessionScope

ALL_DOCUMENTS = Scope()


@runtime_checkable
class HasScope(Protocol):
    """A thing that stands for its own tokens in a scope, such as an open session."""

    @property
    def scope(self) -> SessionScope: ...


Visible = Scope | SessionScope | HasScope | str  # A document id, a session, or a ready-made scope.
ScopeLike = Visible | Iterable[Visible] | None


def scope_of(scope: ScopeLike = None, where: Where = None) -> Scope:
    """What a query may see: the union of what `scope` names, documents narrowed by `where`.

    None: all documents. Document ids: just those. Sessions: just those, and with `where` also the documents that match.
    `[ALL_DOCUMENTS, session]`: everything and a session. Raises InvalidArgument for anything else.
    """
    narrowed = filter_of(where)
    if scope is None:
        return Scope(where=narrowed)
    if isinstance(scope, str | Scope | SessionScope | HasScope):
        scope = (scope,)
    try:
        parts = [_one(part) for part in scope]
    except TypeError:
        raise _not_a_scope(scope) from None
    merged = _union(parts)
    if narrowed is None:
        return merged
    only_sessions = merged.documents == () and merged.sessions
    filters = tuple(f for f in (merged.where, narrowed) if f is not None)
    return Scope(
        documents=None if only_sessions else merged.documents,
        where=filters[0] if len(filters) == 1 else AllOf(filters),
        sessions=merged.sessions,
    )


def session_scope(session: SessionScope, also: ScopeLike) -> list[Visible]:
    """A session and what else a query may see."""
    if also is None or isinstance(also, str | Scope | SessionScope | HasScope):
        also = () if also is None else (also,)
    return [session, *also]


def _one(part: object) -> Scope:
    if isinstance(part, Scope):
        return part
    if isinstance(part, str):
        return Scope(documents=(part,))
    if isinstance(part, SessionScope):
        return Scope(documents=(), sessions=(part,))
    if isinstance(part, HasScope):
        return Scope(documents=(), sessions=(part.scope,))
    raise _not_a_scope(part)


def _union(parts: list[Scope]) -> Scope:
    if len(parts) == 1:
        return parts[0]
    # A union of filtered scopes is not one scope: "documents a and b where x, or c where y" has no such form.
    if any(part.where is not None for part in parts if part.documents != ()):
        raise InvalidArgument("a scope with a filter cannot be joined with others; give the filter as `where`")
    everything = any(part.documents is None for part in parts)
    named = dict.fromkeys(document for part in parts for document in part.documents or ())
    sessions = dict.fromkeys(session for part in parts for session in part.sessions)
    return Scope(documents=None if everything else tuple(named), sessions=tuple(sessions))


def _not_a_scope(found: object) -> InvalidArgument:
    kind = type(found).__name__
    return InvalidArgument(f"a scope is made of document ids, sessions and Scope objects, not of {kind}")
