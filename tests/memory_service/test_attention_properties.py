"""Exact Attend is attention over the tokens in scope, whatever brought them there and wherever they lie.

Hypothesis makes up histories: documents put, replaced and deleted in any order, sessions appended to in any cuts,
memories warmed, compacted and restarted. Everything is cut into small pieces, so that a few hundred tokens fill many
slabs, parts, segments and disk reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from memory_service import verbs
from memory_service.attention import scan
from memory_service.errors import NotFound
from memory_service.settings import StoreOptions
from memory_service.store.store import Store
from memory_service.types.conditions import AllOf, AnyOf, Compare, Condition, Filter, Not
from memory_service.types.documents import Document
from memory_service.types.operations import OperationKind, OperationState
from memory_service.types.scopes import Scope, SessionScope
from memory_service.types.sessions import SessionAppend
from memory_service.types.specs import DType, MemorySpec
from tests.memory_service.oracle import (
    ME,
    Source,
    check_exact,
    document,
    everything_in_small_pieces,
    finish,
    put,
    spec_of,
    tensors,
    warm,
)

LAYERS = (3, 7)
NAMES = tuple("abcde")


@dataclass
class History:
    """A store, and what it should hold."""

    spec: MemorySpec
    directory: Path | None
    resident_bytes: int
    store: Store = field(init=False)
    documents: dict[str, Document] = field(default_factory=dict)
    session: str = ""
    told: list[list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: [[] for _ in LAYERS])  # Per layer.
    steps: int = 0

    def __post_init__(self) -> None:
        self.open()
        self.store.run(ME, verbs.CreateMemory("m", self.spec))

    def open(self) -> None:
        self.store = Store.open(self.directory, StoreOptions(background=False, resident_bytes=self.resident_bytes))

    # --- Steps ------------------------------------------------------------------------------------------------------

    def put(self, name: str, tokens: int) -> None:
        one = document(name, tokens, self.spec, f"{self.steps}{name}", {"n": tokens, "name": name})
        put(self.store, "m", one, replacing=True)
        self.documents[name] = one

    def delete(self, name: str) -> None:
        if name in self.documents:
            self.store.run(ME, verbs.DeleteDocument("m", name))
            del self.documents[name]
        else:
            with pytest.raises(NotFound):
                self.store.run(ME, verbs.DeleteDocument("m", name))

    def append(self, which: int, tokens: int) -> None:
        """To one layer, or (2) to both if they are equally long."""
        lengths = [sum(keys.shape[1] for keys, _ in layer) for layer in self.told]
        layers = [0, 1] if which == 2 and lengths[0] == lengths[1] else [which % 2]
        if not self.session:
            self.session = self.store.run(ME, verbs.OpenSession("m", self.spec.fingerprint)).id
        keys, values = (tensor[: len(layers)] for tensor in tensors(self.spec, tokens, f"{self.steps}s"))
        one = SessionAppend(self.session, tuple(LAYERS[n] for n in layers), lengths[layers[0]], keys, values)
        self.store.run(ME, verbs.AppendSessions("m", (one,)))
        for place, layer in enumerate(layers):
            self.told[layer].append((keys[place], values[place]))

    def warm(self) -> None:
        warm(self.store, "m")

    def compact(self) -> None:
        done = finish(self.store, "m", OperationKind.COMPACT)
        assert done.state is OperationState.DONE, done.message

    def restart(self) -> None:
        if self.directory is None:
            return
        self.store.close()
        self.open()
        self.session, self.told = "", [[] for _ in LAYERS]

    # --- Checks -----------------------------------------------------------------------------------------------------

    def sources(self, scope: Scope, layer: int) -> list[Source]:
        chosen = [
            one
            for name, one in self.documents.items()
            if (scope.documents is None or name in scope.documents)
            and (scope.where is None or scope.where.matches(one.metadata))
        ]
        found = [Source(one.id, one.keys[layer], one.values[layer]) for one in chosen]
        for session in scope.sessions:
            nothing = torch.zeros(2, 0, 8, dtype=self.spec.dtype.torch)
            told = [(nothing, nothing), *self.told[layer]]
            keys, values = (torch.cat([pair[which] for pair in told], dim=1)[:, : session.until] for which in (0, 1))
            found.append(Source(f"session:{session.id}", keys, values))
        return [one for one in found if one.keys.shape[1]]

    def check(self, scope: Scope, layer: int, queries: Tensor, top_k: int) -> None:
        known = tuple(dict.fromkeys(name for name in scope.documents or () if name in self.documents))
        scope = Scope(None if scope.documents is None else known, scope.where, scope.sessions)
        sources = self.sources(scope, layer)
        check_exact(
            self.store, "m", self.spec, sources, scope, queries, layer=LAYERS[layer], top_k=top_k, note=(scope, top_k)
        )

    def check_bytes(self) -> None:
        """Every document, every byte, in two cuts."""
        for name, one in self.documents.items():
            half = one.tokens // 2
            for first, count in ((0, half), (half, one.tokens)):
                if count:
                    got = self.store.run(ME, verbs.Fetch("m", name, 7, first, count))
                    assert torch.equal(got.keys, one.keys[1, :, first : first + count])
                    assert torch.equal(got.values, one.values[1, :, first : first + count])
                    assert torch.equal(got.token_ids, one.token_ids[first : first + count])  # type: ignore[index]


Step = Callable[[History], None]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    name, tokens = draw(st.sampled_from(NAMES)), draw(st.integers(1, 160))
    which = draw(st.integers(0, 2))
    return draw(
        st.sampled_from(
            [
                described(f"put {name} {tokens}", lambda history: history.put(name, tokens)),
                described(f"put {name} {tokens}", lambda history: history.put(name, tokens)),
                described(f"delete {name}", lambda history: history.delete(name)),
                described(f"append {which} {tokens}", lambda history: history.append(which, tokens)),
                described("warm", History.warm),
                described("compact", History.compact),
                described("restart", History.restart),
            ]
        )
    )


def described(text: str, step: Step) -> Step:
    def taken(history: History) -> None:
        note(text)
        step(history)

    return taken


NUMBERS = st.integers(0, 160)
FILTERS: st.SearchStrategy[Filter] = st.recursive(
    st.one_of(
        st.builds(lambda c, n: Condition("n", c, (n,)), st.sampled_from([Compare.LT, Compare.GE, Compare.NE]), NUMBERS),
        st.builds(lambda some: Condition("name", Compare.IN, tuple(some)), st.sets(st.sampled_from(NAMES))),
        st.just(Condition("missing", Compare.EXISTS)),
    ),
    lambda inner: st.one_of(
        st.builds(lambda parts: AllOf(tuple(parts)), st.lists(inner, max_size=2)),
        st.builds(lambda parts: AnyOf(tuple(parts)), st.lists(inner, max_size=2)),
        st.builds(Not, inner),
    ),
    max_leaves=3,
)
SCOPES = st.builds(
    lambda documents, where, until, sees: (Scope(documents, where), until, sees),
    st.none() | st.lists(st.sampled_from(NAMES), max_size=4).map(tuple),
    st.none() | FILTERS,
    st.none() | st.integers(0, 200),
    st.booleans(),
)
CHECKS = st.tuples(SCOPES, st.integers(0, 1), st.integers(1, 4), st.sampled_from([0, 1, 8, 60, 700]), st.integers(1, 9))
PLACES = st.sampled_from(["ram", "disk, nothing resident", "disk, some resident", "disk, all resident"])


@contextmanager
def history(place: str, spec: MemorySpec) -> Iterator[History]:
    resident = {"disk, nothing resident": 0, "disk, some resident": 200 * spec.bytes_per_token}.get(place, 1 << 30)
    with everything_in_small_pieces(spec.bytes_per_token), tempfile.TemporaryDirectory(prefix="fot-") as path:
        one = History(spec, None if place == "ram" else Path(path) / "data", resident)
        try:
            yield one
        finally:
            one.store.close()


@settings(max_examples=60)
@given(
    place=PLACES,
    dtype=st.sampled_from(list(DType)),
    fast=st.booleans(),
    taken=st.lists(steps(), min_size=1, max_size=10),
    checks=st.lists(CHECKS, min_size=3, max_size=6),
)
def test_whatever_happened_before_attention_is_over_the_tokens_in_scope(
    place: str,
    dtype: DType,
    fast: bool,
    taken: list[Step],
    checks: list[tuple[tuple[Scope, int | None, bool], int, int, int, int]],
) -> None:
    spec = spec_of(dtype, layers=LAYERS, dim=8)
    with history(place, spec) as one, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "scans_in_bf16", lambda stored, *_: fast and stored == torch.bfloat16)
        for step in taken:
            one.steps += 1
            step(one)
        one.check_bytes()
        for (scope, until, sees), layer, count, top_k, loudness in checks:
            sessions = (SessionScope(one.session, until),) if sees and one.session else ()
            queries = loudness * torch.randn(4, count, 8, generator=torch.Generator().manual_seed(count))
            one.check(Scope(scope.documents, scope.where, sessions), layer, queries, top_k)


@settings(max_examples=15)
@given(
    dtype=st.sampled_from(list(DType)),
    tokens=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    top_k=st.sampled_from([0, 5, 64]),
)
def test_splits_and_orders_of_commits_do_not_change_the_answer(
    dtype: DType, tokens: list[int], order: object, top_k: int
) -> None:
    """The same tokens as one document, as many, the many in another order, and as a session in as many appends."""
    spec = spec_of(dtype, layers=LAYERS, dim=8)
    many = [document(f"d{n}", count, spec, n) for n, count in enumerate(tokens)]
    whole = Document("whole", torch.cat([d.keys for d in many], 2), torch.cat([d.values for d in many], 2))
    shuffled = list(many)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    with history("disk, some resident", spec) as one:
        for name, documents in (("one", [whole]), ("many", many), ("shuffled", shuffled)):
            one.store.run(ME, verbs.CreateMemory(name, spec))
            for part in documents:
                put(one.store, name, part)
            warm(one.store, name)
        session = one.store.run(ME, verbs.OpenSession("m", spec.fingerprint)).id
        first = 0
        for part in many:
            append = SessionAppend(session, LAYERS, first, part.keys, part.values)
            one.store.run(ME, verbs.AppendSessions("m", (append,)))
            first += part.tokens
        queries = 3 * torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))
        for layer in (0, 1):
            split = [Source(d.id, d.keys[layer], d.values[layer]) for d in many]
            for name, sources, scope in (
                ("one", [Source("whole", whole.keys[layer], whole.values[layer])], Scope()),
                ("many", split, Scope()),
                ("shuffled", split, Scope()),
                ("m", [Source(f"session:{session}", whole.keys[layer], whole.values[layer])], Scope.session(session)),
            ):
                check_exact(one.store, name, spec, sources, scope, queries, layer=LAYERS[layer], top_k=top_k, note=name)
