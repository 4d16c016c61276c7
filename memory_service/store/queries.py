"""Attend, search and fetch: what reads a memory. Scopes are resolved here, the attention itself is the engine's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from memory_service import verbs
from memory_service.attention.provenance import session_source
from memory_service.attention.scan import Arena
from memory_service.attention.slabs import read_spans
from memory_service.errors import InvalidArgument, SessionExpired
from memory_service.pieces import cut_attend, join_attended
from memory_service.store import engine
from memory_service.store.live_memory import LiveMemory
from memory_service.store.memories import Memories
from memory_service.store.recent import Recent
from memory_service.store.sessions import Session, Sessions
from memory_service.types.answers import Attended, Fetched, TopTokens
from memory_service.types.callers import Cancel
from memory_service.types.questions import AttendGroup

_PIECE_BYTES = 16 << 20  # Of queries and answers looked at together: at most 32 times as much working memory.


class Queries:
    """Answers what reads the memories of a store. Thread-safe; a thread that asks keeps its working memory."""

    def __init__(self, memories: Memories, sessions: Sessions, device: torch.device):
        self._memories = memories
        self._sessions = sessions
        self._device = device
        self._arenas = threading.local()
        self._recent = Recent()

    def expire(self) -> None:
        """Forget what was found some moments ago."""
        self._recent.expire()

    def attend(self, tenant: str, verb: verbs.Attend, cancel: Cancel) -> tuple[Attended, ...]:
        """Attention of every group. Raises NotFound, InvalidArgument, SessionExpired, Cancelled, DeadlineExceeded."""
        memory = self._memories.get(tenant, verb.memory)
        layer = memory.spec.layer_index(verb.layer)
        engine.check_groups(memory.spec, verb.groups, verb.options)
        sessions = self._scope_sessions(tenant, memory, verb.groups, layer)
        arena = getattr(self._arenas, "arena", None)
        if arena is None:
            arena = self._arenas.arena = Arena()
        # Queries do not know of each other: cut along them, so that working memory has a bound whatever is asked.
        pieces, parts = cut_attend(verb, _PIECE_BYTES)
        memory.last_used = time.monotonic()
        with memory.reading():
            answers = [
                engine.attend(memory, sessions, layer, part, arena, self._device, cancel, self._recent)
                for part in parts
            ]
        return join_attended(pieces, answers)

    def search(self, tenant: str, verb: verbs.Search, cancel: Cancel) -> tuple[TopTokens, ...]:
        """The top tokens of every group, without attention over them. Raises as `attend` does."""
        if not verb.options.top_k:
            raise InvalidArgument("search needs top_k ≥ 1")
        options = replace(verb.options, tokens=True)
        attend = verbs.Attend(verb.memory, verb.layer, verb.groups, options, verb.placement)
        answers = self.attend(tenant, attend, cancel)
        return tuple(answer.tokens for answer in answers if answer.tokens is not None)

    def fetch(self, tenant: str, verb: verbs.Fetch) -> Fetched:
        """Stored keys and values of a run of tokens. Raises NotFound, InvalidArgument, SessionExpired, DataLoss."""
        memory = self._memories.get(tenant, verb.memory)
        layer = memory.spec.layer_index(verb.layer)
        if verb.first_token < 0 or verb.tokens < 1:
            raise InvalidArgument("first_token must be ≥ 0 and tokens ≥ 1")
        prefix = session_source("")
        with memory.reading():
            if verb.source.startswith(prefix):
                session = self._sessions.get(tenant, memory.row.key, verb.source.removeprefix(prefix))
                length = session.tokens[layer]
            else:
                document = memory.document(verb.source)
                length = document.row.tokens
            first, count = verb.first_token, min(verb.tokens, length - verb.first_token)
            if count < 1:
                raise InvalidArgument(f"{verb.source!r} has {length} tokens, there is none at {first}")
            if verb.source.startswith(prefix):
                keys, values, ids = read_spans(session.spans(layer), layer, first, count)
            else:
                keys, values, ids = memory.read(document, layer, first, count)
        return Fetched(keys, values, ids, first)

    def _scope_sessions(
        self, tenant: str, memory: LiveMemory, groups: Iterable[AttendGroup], layer: int
    ) -> dict[str, Session]:
        scopes = [scope for group in groups for scope in group.scope.sessions]
        found = {scope.id: self._sessions.get(tenant, memory.row.key, scope.id) for scope in scopes}
        if any(found[scope.id].tokens[layer] < scope.at_least for scope in scopes):
            raise SessionExpired("the session misses tokens that were appended elsewhere", reason="SESSION_SHORT")
        return found
