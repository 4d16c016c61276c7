"""What callers may write as a scope, and what it stands for."""

from __future__ import annotations

import pytest

from memory_service.client.scopes import ALL_DOCUMENTS, ScopeLike, scope_of, session_scope
from memory_service.errors import InvalidArgument
from memory_service.filters import parse
from memory_service.types.conditions import AllOf
from memory_service.types.scopes import Scope, SessionScope

PY = parse("lang = py")
CHAT = SessionScope("s1")


class OpenSession:
    """As a `Session` looks to a scope."""

    scope = CHAT


@pytest.mark.parametrize(
    ("given", "where", "expected"),
    [
        (None, None, Scope()),
        (None, "lang = py", Scope(where=PY)),
        ("doc-1", None, Scope(documents=("doc-1",))),
        (["b", "a", "b"], None, Scope(documents=("b", "a"))),
        ([], None, Scope(documents=())),
        (["a"], "lang = py", Scope(documents=("a",), where=PY)),
        (CHAT, None, Scope(documents=(), sessions=(CHAT,))),
        (OpenSession(), None, Scope(documents=(), sessions=(CHAT,))),
        (["a", OpenSession()], None, Scope(documents=("a",), sessions=(CHAT,))),
        ([OpenSession()], "lang = py", Scope(documents=None, where=PY, sessions=(CHAT,))),
        ([ALL_DOCUMENTS, CHAT], None, Scope(documents=None, sessions=(CHAT,))),
        ([ALL_DOCUMENTS, "a"], None, Scope()),
        (Scope(documents=("a",)), None, Scope(documents=("a",))),
        (Scope(where=PY), "year = 1", Scope(where=AllOf((PY, parse("year = 1"))))),
        ((one for one in ("a", "b")), None, Scope(documents=("a", "b"))),
    ],
)
def test_a_scope_is_the_union_of_what_is_named(given: ScopeLike, where: str | None, expected: Scope) -> None:
    assert scope_of(given, where) == expected


@pytest.mark.parametrize("wrong", [3, [None], {"a": 1, 2: 3}, [["a"]]])
def test_what_is_no_scope_is_refused(wrong: ScopeLike) -> None:
    with pytest.raises(InvalidArgument, match="a scope is made of document ids, sessions and Scope objects"):
        scope_of(wrong)


def test_filtered_scopes_cannot_be_joined() -> None:
    with pytest.raises(InvalidArgument, match="give the filter as `where`"):
        scope_of([Scope(where=PY), "a"])


@pytest.mark.parametrize(
    ("documents", "where", "expected"),
    [
        (None, None, Scope(documents=(), sessions=(CHAT,))),
        (None, "lang = py", Scope(documents=None, where=PY, sessions=(CHAT,))),
        ("a", None, Scope(documents=("a",), sessions=(CHAT,))),
        (["a", "b"], None, Scope(documents=("a", "b"), sessions=(CHAT,))),
        (ALL_DOCUMENTS, None, Scope(documents=None, sessions=(CHAT,))),
    ],
)
def test_a_session_sees_itself_and_what_is_named_beside_it(
    documents: ScopeLike, where: str | None, expected: Scope
) -> None:
    assert scope_of(session_scope(CHAT, documents), where) == expected
