"""What each row of a batch has put into memory: stretches of sessions, shared between beams until they part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memory_service import DeadlineExceeded, FotError, Session, SessionScope, Unavailable


@dataclass(frozen=True, slots=True)
class Stretch:
    """The first tokens of a session."""

    session: Session
    tokens: int


@dataclass(slots=True)
class Row:
    """One sequence's share of the memory, oldest first."""

    stretches: tuple[Stretch, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens this row has in memory."""
        return sum(stretch.tokens for stretch in self.stretches)

    def seen(self) -> tuple[SessionScope, ...]:
        """All of this row's tokens, as parts of a scope."""
        return self.scopes(self.tokens) if self.stretches else ()

    def scopes(self, until: int) -> tuple[SessionScope, ...]:
        """This row's first `until` tokens, as parts of a scope."""
        scopes, left = [], until
        for stretch in self.stretches:
            if left <= 0:
                break
            scopes.append(SessionScope(stretch.session.id, min(left, stretch.tokens)))
            left -= stretch.tokens
        return tuple(scopes)


class Rows:
    """The rows of a batch and the sessions they live in. Sessions open when first needed."""

    def __init__(self, open_session: Callable[[], Session]):
        self._open = open_session
        self._sessions: list[Session] = []
        self._written: dict[str, int] = {}
        self.rows: list[Row] = []

    def resize(self, count: int) -> None:
        """Start `count` rows with nothing in memory."""
        self.rows = [Row() for _ in range(count)]

    def tail(self, row: Row) -> Stretch:
        """Where this row's next tokens go: its last session if nobody else reads on from there, else a new one."""
        if row.stretches:
            last = row.stretches[-1]
            shared = Counter(r.stretches[-1].session.id for r in self.rows if r.stretches)[last.session.id] > 1
            if not shared and self._written[last.session.id] == last.tokens:
                return last
        session = self._open()
        self._sessions.append(session)
        return Stretch(session, 0)

    def grow(self, row: Row, tail: Stretch, tokens: int) -> None:
        """Count `tokens` appended to the session that `tail` named."""
        grown = Stretch(tail.session, tail.tokens + tokens)
        self._written[tail.session.id] = grown.tokens
        kept = row.stretches[:-1] if tail.tokens else row.stretches
        row.stretches = (*kept, grown)

    def reorder(self, chosen: Sequence[int]) -> None:
        """Rows become copies of the chosen ones, as beams do; sessions no beam reads any more are closed."""
        self.rows = [Row(self.rows[index].stretches) for index in chosen]
        read = {stretch.session.id for row in self.rows for stretch in row.stretches}
        unread = [session for session in self._sessions if session.id not in read]
        self._sessions = [session for session in self._sessions if session.id in read]
        _close(unread)

    def close(self) -> None:
        """Free the sessions. Harmless twice."""
        sessions, self._sessions, self.rows = self._sessions, [], []
        _close(sessions)


def _close(sessions: Sequence[Session]) -> None:
    for session in sessions:
        try:
            session.close()
        except (Unavailable, DeadlineExceeded):
            # Nobody answers: asking for every other session would take as long again. Leases free them.
            return
        except FotError:
            # The lease frees it anyway; closing must not hide why the caller stopped.
            continue
