"""One client, every place: each verb gives the same answer and the same error in RAM, in a directory and over gRPC.

The answers in RAM are the reference; `expected` values in the tests about meaning live in the tests of the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_service import (
    ALL_DOCUMENTS,
    AttendOptions,
    Client,
    DType,
    Fingerprint,
    FotError,
    IndexPolicy,
    Memory,
    MemorySpec,
    Scope,
    Session,
    SessionScope,
)
from memory_service.verbs import GetMemory
from tests.memory_service.places import PLACES, client_at

TINY = Fingerprint("tiny", "main", "c0ffee", '{"theta":10000.0}')
SPEC = MemorySpec(TINY, (1, 4), 2, 8, DType.F32, IndexPolicy("auto", 1000))
VOLATILE = {"committed_at", "created_at", "updated_at", "expires_at", "operation", "segments"}
Outcome = Any


class Held:
    """A memory with documents, and an open session, in one place."""

    def __init__(self, client: Client):
        self.client = client
        self.memory: Memory = client.memory("default", SPEC)
        for number, metadata in enumerate(({"lang": "py", "year": 2020}, {"lang": "c", "year": 2021}, {})):
            tokens = 5 + 20 * number
            keys, values = drawn(number, 2, 2, tokens)
            ids = torch.arange(tokens) + 100 * number
            self.memory.put(f"doc-{number}", keys, values, token_ids=ids, metadata=metadata)
        self.session: Session = self.memory.session(60)
        keys, values = drawn(9, 2, 2, 12)
        self.session.append([1, 4], keys, values, token_ids=range(12))


def drawn(seed: int, *shape: int) -> Tensor:
    """Keys and values [2, *shape, 8]."""
    return torch.randn(2, *shape, 8, generator=torch.Generator().manual_seed(seed))


def spoilt(keys_and_values: Tensor) -> Tensor:
    keys_and_values[1, 0, 1, 5000, 3] = torch.inf
    return keys_and_values


def queries(count: int = 3, heads: int = 4) -> Tensor:
    return torch.randn(heads, count, 8, generator=torch.Generator().manual_seed(77))


def closed_session(held: Held) -> Session:
    with held.memory.session() as session:
        pass
    return session


def large(held: Held) -> list[object]:
    """A document of several messages, and what comes back of it."""
    keys, values = drawn(5, 2, 2, 6000)
    stored = held.memory.put("large", keys, values, token_ids=range(6000))
    fetched = held.memory.fetch("large", 4, 17, 5900)
    found = held.memory.attend(4, queries(), scope="large", top_k=4)
    return [stored, bool(torch.equal(fetched.keys, keys[1, :, 17:5917])), fetched.token_ids, found]


def many_queries(held: Held) -> object:
    """More queries than one message takes: 2 x 4096 x 3000 tokens' answers."""
    return held.memory.attend(1, queries(2100), top_k=20, tokens=True, attribution=True, measure=True)


def more_rows_than_one_call(held: Held) -> object:
    """4 x 17,000 rows of queries, where a call takes 65,536."""
    return held.memory.attend(1, queries(17_000), scope="doc-1", attribution=True)


def session_life(held: Held) -> list[object]:
    memory, keys, values = held.memory, *drawn(6, 2, 4)
    session = memory.session(30)
    session.append(1, keys, values)
    session.append(1, keys, values, first_token=4, token_ids=[1, 2, 3, 4])
    repeated = session.piece(1, keys, values, first_token=4, token_ids=[1, 2, 3, 4])
    memory.append_sessions([repeated, held.session.piece([1, 4], *drawn(3, 2, 2, 1))])
    again = memory.resume_session(session.id)
    lengths = [session.length(1), session.length(4), again.length(1), held.session.length(4)]
    answers = [again.attend(1, queries(), until=6, top_k=3, tokens=True), session.fetch(1, 2, 4)]
    session.renew()
    session.close()
    session.close()
    return [lengths, anonymous(answers, session.id)]


def operations(held: Held) -> list[object]:
    done = [held.memory.wait(held.memory.start(kind), 30) for kind in ("verify", "compact", "index")]
    listed = [operation.kind for operation in held.memory.operations()]
    known = [held.memory.operation(one.id).state for one in done] + [held.client.operation(done[0].id).kind]
    return [[(one.kind, one.state, one.memory) for one in done], sorted(listed), known]


def life_of_a_memory(held: Held) -> list[object]:
    client = held.client
    made = client.memory("other", SPEC)
    made.put("d", *drawn(1, 2, 2, 3))
    names = [info.name for info in client.memories()]
    figures = client.run(GetMemory("other"))
    client.delete("other")
    return [names, figures, [info.name for info in client.memories()], client.stats().documents]


def documents_life(held: Held) -> list[object]:
    memory = held.memory
    replaced = memory.put("doc-1", *drawn(8, 2, 2, 4), replace=True, metadata={"lang": "rust", "new": True, "x": 0.5})
    twice = [memory.put("again", *drawn(8, 2, 2, 2), request_id="r1") for _ in range(2)]
    memory.delete("doc-0", request_id="r2")
    memory.delete("doc-0", request_id="r2")
    return [replaced, twice, list(memory.documents()), list(memory.documents("lang exists")), memory.get("doc-1")]


SAME: dict[str, Callable[[Held], Outcome]] = {
    "info": lambda h: h.memory.info(),
    "get": lambda h: h.memory.get("doc-1"),
    "documents": lambda h: list(h.memory.documents()),
    "documents where": lambda h: list(h.memory.documents("lang in (py, c) and year >= 2021")),
    "documents where several": lambda h: list(h.memory.documents(["lang = py", "not year > 2020"])),
    "stats": lambda h: (lambda s: (s.documents, s.tokens, s.bytes, s.sessions, s.session_bytes))(h.memory.stats()),
    "dense": lambda h: h.memory.attend(1, queries()),
    "top k": lambda h: h.memory.attend(4, queries(), top_k=7),
    "everything asked": lambda h: h.memory.attend(
        4, queries(), top_k=7, engine="exact", scale=0.3, logit_gap=2.0, tokens=True, attribution=True, measure=True
    ),
    "more than there is": lambda h: h.memory.attend(1, queries(), top_k=4000, tokens=True),
    "half precision out": lambda h: h.memory.attend(1, queries(), output_dtype="bf16"),
    "half precision in": lambda h: h.memory.attend(1, queries().half(), top_k=3),
    "scope of ids": lambda h: h.memory.attend(1, queries(), scope=["doc-2", "doc-0"], attribution=True),
    "scope of a filter": lambda h: h.memory.attend(1, queries(), where="lang = c", attribution=True),
    "empty scope": lambda h: h.memory.attend(1, queries(), scope=[], top_k=3, tokens=True, attribution=True),
    "scope that matches nothing": lambda h: h.memory.attend(1, queries(), where="lang = cobol"),
    "session": lambda h: h.session.attend(1, queries()),
    "session until": lambda h: h.session.attend(1, queries(), until=5, top_k=2),
    "session and documents": lambda h: anonymous(
        h.session.attend(1, queries(), documents=ALL_DOCUMENTS, top_k=9, tokens=True, attribution=True), h.session.id
    ),
    "session and filter": lambda h: h.session.attend(1, queries(), where="lang = py"),
    "groups": lambda h: h.memory.attend_groups(
        4,
        [("doc-0", queries(1)), ([h.session.until(3)], queries(2)), (Scope(), queries(3))],
        AttendOptions(top_k=5),
    ),
    "many queries": many_queries,
    "more rows than one call": more_rows_than_one_call,
    "search": lambda h: h.memory.search(4, queries(), top_k=5, where="lang exists"),
    "search groups": lambda h: h.memory.search_groups(1, [(None, queries())], AttendOptions(top_k=3)),
    "fetch": lambda h: h.memory.fetch("doc-2", 4, 10, 20),
    "index": lambda h: [
        h.memory.wait(h.memory.start("index"), 30).state,
        h.memory.attend(1, queries(), top_k=5, engine="index", search={"candidates": 64}, measure=True),
        h.memory.attend(1, queries(), where="lang = c", top_k=5, engine="index", tokens=True),
        h.memory.stats().indexed_tokens,
    ],
    "fetch session": lambda h: h.session.fetch(4, 3, 2),
    "large document": large,
    "session life": session_life,
    "documents life": documents_life,
    "operations": operations,
    "life of a memory": life_of_a_memory,
    "repr": lambda h: repr(h.memory).replace(h.client.connection.target, "here"),
    # Mistakes, each with its own error and sentence.
    "no such memory": lambda h: h.client.memory("nowhere"),
    "no such document": lambda h: h.memory.get("nothing"),
    "delete no such document": lambda h: h.memory.delete("nothing"),
    "delete no such memory": lambda h: h.client.delete("nowhere"),
    "no such document in scope": lambda h: h.memory.attend(1, queries(), scope="nothing"),
    "no such session in scope": lambda h: h.memory.attend(1, queries(), scope=SessionScope("nothing")),
    "no such operation": lambda h: h.memory.operation("nothing"),
    "no such session": lambda h: h.memory.resume_session("nothing"),
    "closed session": lambda h: (lambda s: s.append(1, *drawn(1, 2, 1)))(closed_session(h)),
    "memory of another model": lambda h: h.client.memory("default", MemorySpec(Fingerprint("x"), (1, 4), 2, 8)),
    "memory of another shape": lambda h: h.client.memory("default", MemorySpec(TINY, (1, 4), 2, 16, DType.F32)),
    "bad memory name": lambda h: h.client.memory("a/b", SPEC),
    "bad spec": lambda h: h.client.memory("bad", MemorySpec(TINY, (4, 1), 2, 8)),
    "taken id": lambda h: h.memory.put("doc-0", *drawn(1, 2, 2, 3)),
    "taken id, large": lambda h: h.memory.put("doc-0", *drawn(1, 2, 2, 9000)),
    "wrong model": lambda h: h.memory.put("d", *drawn(1, 2, 2, 3), fingerprint=Fingerprint("x")),
    "wrong model, large": lambda h: h.memory.put("d", *drawn(1, 2, 2, 9000), fingerprint=Fingerprint("x")),
    "wrong model session": lambda h: h.memory.session(fingerprint=Fingerprint("x")),
    "wrong rank": lambda h: h.memory.put("d", *drawn(1, 2, 3)),
    "wrong layers": lambda h: h.memory.put("d", *drawn(1, 3, 2, 3)),
    "wrong heads, large": lambda h: h.memory.put("d", *drawn(1, 2, 3, 9000)),
    "no tokens": lambda h: h.memory.put("d", *drawn(1, 2, 2, 0)),
    "values of another shape": lambda h: h.memory.put("d", drawn(1, 2, 2, 3)[0], drawn(1, 2, 2, 4)[0]),
    "nan": lambda h: h.memory.put("d", *(drawn(1, 2, 2, 3) * torch.nan)),
    "infinity, large": lambda h: h.memory.put("d", *spoilt(drawn(1, 2, 2, 9000))),
    "token ids of another length": lambda h: h.memory.put("d", *drawn(1, 2, 2, 3), token_ids=[1]),
    "negative token ids": lambda h: h.memory.put("d", *drawn(1, 2, 2, 3), token_ids=[-1, 0, 1]),
    "integers": lambda h: h.memory.put("d", *torch.ones(2, 2, 2, 3, 8, dtype=torch.int32)),
    "empty id": lambda h: h.memory.put("", *drawn(1, 2, 2, 3)),
    "control characters": lambda h: h.memory.put("a\nb", *drawn(1, 2, 2, 3)),
    "too much metadata": lambda h: h.memory.put("d", *drawn(1, 2, 2, 3), metadata={str(n): n for n in range(65)}),
    "metadata too long": lambda h: h.memory.put("d", *drawn(1, 2, 2, 3), metadata={"k": "x" * 20_000}),
    "layer not kept": lambda h: h.memory.attend(2, queries()),
    "negative layer": lambda h: h.memory.attend(-1, queries()),
    "heads that do not divide": lambda h: h.memory.attend(1, queries(heads=3)),
    "wrong head_dim": lambda h: h.memory.attend(1, queries()[..., :4]),
    "queries of rank 2": lambda h: h.memory.attend(1, queries()[0]),
    "nan queries": lambda h: h.memory.attend(1, queries() * torch.nan),
    "integer queries": lambda h: h.memory.attend(1, queries().long()),
    "top_k too large": lambda h: h.memory.attend(1, queries(), top_k=1 << 20),
    "top_k negative": lambda h: h.memory.attend(1, queries(), top_k=-1),
    "tokens of dense": lambda h: h.memory.attend(1, queries(), tokens=True),
    "no such engine": lambda h: h.memory.attend(1, queries(), engine="fast"),
    "index for dense": lambda h: h.memory.attend(1, queries(), engine="index"),
    "scale of zero": lambda h: h.memory.attend(1, queries(), scale=0.0),
    "unknown search parameter": lambda h: h.memory.attend(1, queries(), top_k=1, search={"speed": 2}),
    "bad filter": lambda h: h.memory.attend(1, queries(), where="lang ="),
    "search without k": lambda h: h.memory.search(1, queries(), top_k=0),
    "no groups": lambda h: h.memory.attend_groups(1, []),
    "fetch before the start": lambda h: h.memory.fetch("doc-0", 1, -1, 2),
    "fetch nothing": lambda h: h.memory.fetch("doc-0", 1, 0, 0),
    "fetch past the end": lambda h: h.memory.fetch("doc-0", 1, 99, 1),
    "append to a gap": lambda h: h.session.append(1, *drawn(1, 2, 1), first_token=50),
    "append of another shape": lambda h: h.session.append(1, *drawn(1, 3, 1)),
    "append to a layer not kept": lambda h: h.session.append(2, *drawn(1, 2, 1)),
    "append nan": lambda h: h.session.append(1, *(drawn(1, 2, 1) * torch.nan)),
    "lease too long": lambda h: h.memory.session(1e9),
    "lease of nothing": lambda h: h.memory.session(0),
    "no such kind of operation": lambda h: h.memory.start("dance"),
}


def outcome(ask: Callable[[Held], Outcome], held: Held) -> Outcome:
    try:
        return comparable(ask(held))
    except FotError as error:
        return (type(error).__name__, error.message, error.code)


def comparable(value: Any) -> Any:
    """Plain values: tensors as lists of rounded numbers, times and generated names left out."""
    if isinstance(value, Tensor):
        rounded = torch.where(value.isfinite(), (value.double() * 1e4).round() / 1e4, value.double())
        return (str(value.dtype), rounded.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        named = {one.name: comparable(getattr(value, one.name)) for one in fields(value) if one.name not in VOLATILE}
        return type(value).__name__, named
    if isinstance(value, list | tuple):
        return [comparable(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


def anonymous(value: Any, session_id: str) -> Any:
    """A generated session id as "it"."""
    if isinstance(value, str):
        return value.replace(session_id, "it")
    if isinstance(value, tuple | list):
        return [anonymous(one, session_id) for one in value]
    if isinstance(value, dict):
        return {name: anonymous(one, session_id) for name, one in value.items()}
    return value if not is_dataclass(value) else anonymous(comparable(value), session_id)


def outcomes(place: str, directory: Path) -> dict[str, Outcome]:
    """What a place says to everything; each on a fresh memory, for some of it writes."""
    found = {}
    with client_at(place, directory) as client:
        for name, ask in SAME.items():
            found[name] = outcome(ask, Held(client))
            client.delete("default")
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return outcomes("memory", tmp_path_factory.mktemp("none"))


def same(got: Outcome, expected: Outcome) -> bool:
    """Equal, but for one unit of rounding: blocks of keys lie differently in memory from place to place."""
    if isinstance(got, float) and isinstance(expected, float):
        return got == expected or abs(got - expected) < 1.5e-4
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], expected[key]) for key in got)
    if isinstance(got, list | tuple) and type(got) is type(expected):
        return len(got) == len(expected) and all(map(same, got, expected))
    return bool(got == expected)


# The wire finds these before the store does, or a chunk before a tensor: the same error, in its own words.
WORDED_BY_THE_WIRE = {"integer queries", "queries of rank 2", "infinity, large"}
MISTAKES = list(SAME)[list(SAME).index("no such memory") :]


def test_mistakes_are_mistakes_and_the_rest_is_not(reference: dict[str, Outcome]) -> None:
    refused = [name for name, got in reference.items() if isinstance(got, tuple) and len(got) == 3]
    assert refused == MISTAKES


@pytest.mark.parametrize("place", [place for place in PLACES if place != "memory"])
def test_all_places_say_the_same(place: str, reference: dict[str, Outcome], tmp_path: Path) -> None:
    different = {}
    for name, got in outcomes(place, tmp_path).items():
        expected = reference[name]
        if name in WORDED_BY_THE_WIRE:
            got, expected = (got[0], got[2]), (expected[0], expected[2])
        if not same(got, expected):
            different[name] = (str(expected)[:400], str(got)[:400])
    assert different == {}
