"""What a client of a cluster remembers between calls: specs, sessions, and how many tokens each shard holds."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memory_service.errors import Unavailable
from memory_service.shards import ShardMap
from memory_service.types.documents import DocumentInfo
from memory_service.types.scopes import Scope
from memory_service.types.sessions import SessionInfo
from memory_service.types.specs import MemorySpec
from memory_service.verbs import Attend, Fetch, Search, Verb

_SESSIONS = 4096
_LIST_S = 1.0  # Where others write all the time, a shard would be listed for every answer.


@dataclass(slots=True)
class KnownSession:
    """A session's length as far as this client knows, and the replicas that do not have all of it."""

    tokens: tuple[int, ...] = ()
    lost: frozenset[str] = frozenset()


class Known:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._specs: dict[str, MemorySpec] = {}
        self._sessions: OrderedDict[str, KnownSession] = OrderedDict()
        self._documents: dict[str, dict[str, DocumentInfo]] = {}  # Memory -> id -> document.
        self._listed: dict[tuple[str, str], float] = {}  # (memory, shard) whose documents are all known -> since when.

    # --- Specs ---

    def spec(self, memory: str) -> MemorySpec | None:
        return self._specs.get(memory)

    def learn_spec(self, memory: str, spec: MemorySpec) -> None:
        self._specs[memory] = spec

    def forget_memory(self, memory: str) -> None:
        with self._lock:
            self._specs.pop(memory, None)
            self._documents.pop(memory, None)
            self._listed = {one: since for one, since in self._listed.items() if one[0] != memory}

    # --- Sessions ---

    def session(self, name: str) -> KnownSession | None:
        with self._lock:
            return self._sessions.get(name)

    def learn_session(self, info: SessionInfo, lost: Iterable[str]) -> None:
        """An answer about a session, and the replicas that failed to give the same."""
        with self._lock:
            known = self._sessions.pop(info.id, None) or KnownSession()
            tokens = tuple(map(max, info.tokens, known.tokens)) if known.tokens else info.tokens
            self._sessions[info.id] = KnownSession(tokens, known.lost | frozenset(lost))
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)

    def lose_sessions(self, verb: Verb[Any], addresses: Sequence[str]) -> None:
        """These replicas lack one of the sessions a call named, which another one has."""
        if not addresses:
            return
        groups = verb.groups if isinstance(verb, Attend | Search) else ()
        names = {one.id for group in groups for one in group.scope.sessions}
        if isinstance(verb, Fetch):
            names.add(verb.source.removeprefix("session:"))
        with self._lock:
            for known in (self._sessions[name] for name in names if name in self._sessions):
                known.lost |= frozenset(addresses)

    def forget_session(self, name: str) -> None:
        with self._lock:
            self._sessions.pop(name, None)

    # --- Tokens of documents, to tell what a missing shard leaves out ---

    def learn_shard(self, shards: ShardMap, memory: str, shard: str, documents: Sequence[DocumentInfo]) -> None:
        """All documents of a shard, as they are now."""
        with self._lock:
            mine = self._documents.setdefault(memory, {})
            for name in [one for one in mine if shards.owner(memory, one).id == shard]:
                del mine[name]
            mine.update((one.id, one) for one in documents)
            self._listed[memory, shard] = time.monotonic()

    def may_list(self, memory: str, shard: str) -> bool:
        """Whether it is time to list a shard again, if it seems to have changed."""
        with self._lock:
            return time.monotonic() - self._listed.get((memory, shard), -math.inf) > _LIST_S

    def learn_document(self, memory: str, document: DocumentInfo) -> None:
        with self._lock:
            self._documents.setdefault(memory, {})[document.id] = document

    def forget_document(self, memory: str, document: str) -> None:
        with self._lock:
            self._documents.get(memory, {}).pop(document, None)

    def tokens(self, shards: ShardMap, memory: str, shard: str, scope: Scope) -> int | None:
        """Tokens of documents a scope shows in a shard; None if that was not learnt."""
        with self._lock:
            documents = dict(self._documents.get(memory, {}))
            listed = (memory, shard) in self._listed
        if scope.documents is None:
            if not listed:
                return None
            chosen = [one for one in documents.values() if shards.owner(memory, one.id).id == shard]
        else:
            if not all(name in documents for name in scope.documents):
                return None
            chosen = [documents[name] for name in dict.fromkeys(scope.documents)]
        where = scope.where
        return sum(one.tokens for one in chosen if where is None or where.matches(one.metadata))

    def session_tokens(self, scope: Scope, layer: int) -> int | None:
        """Tokens of the sessions of a scope in a layer (by index); None if that is not known."""
        seen: dict[str, int] = {}
        for one in scope.sessions:
            known = self.session(one.id)
            if known is None or not known.tokens:
                return None
            length = known.tokens[layer]
            seen[one.id] = max(seen.get(one.id, 0), length if one.until is None else min(length, one.until))
        return sum(seen.values())


def unknown_tokens(shard: str) -> Unavailable:
    """The error of an answer whose coverage could not be told."""
    return Unavailable(
        f"shard {shard} is missing and this client never learnt how many tokens it holds, so it cannot say what an "
        "answer would leave out; ask again when the shard is back, or with on_missing=fail",
        reason="COVERAGE_UNKNOWN",
        shards=shard,
    )
