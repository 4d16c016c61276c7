"""Answers Attend: turns scopes into chunks, feeds them to the exact engine or to an index, and writes the answers.

H kv heads, G query heads, R rows of a kv head (its query heads times queries), Q queries, D head_dim, K top_k.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memory_service.attention.exact import Dense, TopK, group_heads, is_finite
from memory_service.attention.provenance import Ledger, Provenance, Ranking, session_source
from memory_service.attention.scan import Arena, Chunk
from memory_service.attention.slabs import largest_norms
from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.index.factories import check_params
from memory_service.store.indexed import candidates, covered, tail
from memory_service.store.live_document import LiveDocument
from memory_service.store.live_memory import LiveMemory
from memory_service.store.plans import Plan
from memory_service.store.recent import Found, Recent, digest
from memory_service.store.sessions import Session
from memory_service.types.answers import Attended, Attribution, Coverage, Measured, Partial, TopTokens
from memory_service.types.callers import Cancel
from memory_service.types.conditions import Filter
from memory_service.types.questions import MAX_GROUPS, MAX_QUERIES, AttendGroup, AttendOptions, Engine
from memory_service.types.specs import MemorySpec
from memory_service.verbs import Attend

_COLD_BYTES = 32 << 20  # Keys and values of cold documents looked at together.
_MASSES = 1 << 23  # Keys times groups whose masses are told apart at a time.
_WORTH_INDEXING = 50_000  # Tokens in scope below which `AUTO` scans exactly.


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """One group's share of a family's query rows."""

    number: int
    group: AttendGroup
    rows: slice


@dataclass(frozen=True, slots=True, eq=False)
class _Family:
    """Groups that see the same documents: their queries go over them together."""

    plan: Plan
    members: tuple[_Member, ...]
    queries: Tensor  # [H, R of all members, D], scaled
    counts: Tensor | None = None  # [H, R of all members], how many of the best take part; None: all of the top k


def check_groups(spec: MemorySpec, groups: Sequence[AttendGroup], options: AttendOptions) -> None:
    """Raise InvalidArgument unless every group's queries fit the memory."""
    options.check()
    check_params(options.search)
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise InvalidArgument(f"a call needs 1 to {MAX_GROUPS} groups, got {len(groups)}")
    for group in groups:
        shape = tuple(group.queries.shape)
        if len(shape) != 3 or shape[2] != spec.head_dim or shape[0] < 1 or shape[0] % spec.kv_heads or shape[1] < 1:
            raise InvalidArgument(
                f"queries must be [query heads (a multiple of {spec.kv_heads}), queries ≥ 1, {spec.head_dim}], "
                f"got {list(shape)}"
            )
        if shape[0] * shape[1] > MAX_QUERIES:
            raise InvalidArgument(f"{shape[0]} heads × {shape[1]} queries exceed {MAX_QUERIES} rows; split the call")
        if not group.queries.is_floating_point() or not is_finite(group.queries):
            raise InvalidArgument("queries must be floating point and hold no NaN or infinity")
        _check_share(group, options)


def _check_share(group: AttendGroup, options: AttendOptions) -> None:
    """Raise InvalidArgument unless what a group says of its part in a larger whole fits its queries and options."""
    shape = group.queries.shape[:2]
    if group.counts is not None:
        if group.counts.shape != shape or not options.top_k:
            raise InvalidArgument(f"counts must be {list(shape)} like the queries, and need top_k ≥ 1")
        if not 0 <= int(group.counts.min()) <= int(group.counts.max()) <= options.top_k:
            raise InvalidArgument(f"counts must be 0 to top_k, which is {options.top_k}")
    if group.lse is not None:
        if group.lse.shape != shape or options.top_k or not options.attribution:
            raise InvalidArgument(f"lse must be {list(shape)} like the queries, and needs attribution and top_k 0")
        if bool(group.lse.isnan().any()) or bool((group.lse == torch.inf).any()):
            raise InvalidArgument("lse must be finite, or −inf where nothing is in scope")


def attend(
    memory: LiveMemory,
    sessions: Mapping[str, Session],
    layer: int,
    verb: Attend,
    arena: Arena,
    device: torch.device,
    cancel: Cancel,
    recent: Recent,
) -> tuple[Attended, ...]:
    """Attention of checked groups at a layer (by index). Call it inside `memory.reading()`."""
    answers: list[Attended | None] = [None] * len(verb.groups)
    for family in _families(memory, verb, device):
        # Who says which documents it takes this memory for joins its answer with others', and asks a second time.
        call = _Call(memory, sessions, layer, family, verb, arena, cancel, recent if verb.placement else None)
        for member, answer in call.answers():
            answers[member.number] = answer
    return tuple(answer for answer in answers if answer is not None)


def _families(memory: LiveMemory, verb: Attend, device: torch.device) -> Iterator[_Family]:
    spec, options = memory.spec, verb.options
    scale = spec.head_dim**-0.5 if options.scale is None else options.scale
    alike: dict[tuple[tuple[str, ...] | None, Filter | None, bool], list[tuple[int, AttendGroup]]] = {}
    for number, group in enumerate(verb.groups):
        alike.setdefault((group.scope.documents, group.scope.where, group.lse is None), []).append((number, group))
    for (documents, where, _), numbered in alike.items():
        members: list[_Member] = []
        queries: list[Tensor] = []
        done = 0
        for number, group in numbered:
            rows = group_heads(group.queries.to(device, torch.float32) * scale, spec.kv_heads)
            members.append(_Member(number, group, slice(done, done + rows.shape[1])))
            queries.append(rows)
            done += rows.shape[1]
        together = torch.cat(queries, dim=1) if len(queries) > 1 else queries[0]
        counts = _counts([group for _, group in numbered], spec.kv_heads, options.top_k, device)
        yield _Family(memory.plan(documents, where, verb.placement), tuple(members), together, counts)


def _counts(groups: Sequence[AttendGroup], kv_heads: int, top_k: int, device: torch.device) -> Tensor | None:
    if all(group.counts is None for group in groups):
        return None
    full = [torch.full(group.queries.shape[:2], top_k) if group.counts is None else group.counts for group in groups]
    return torch.cat([one.to(device, torch.int64).reshape(kv_heads, -1) for one in full], dim=1)


class _Call:
    """One family's way through the engine."""

    def __init__(
        self,
        memory: LiveMemory,
        sessions: Mapping[str, Session],
        layer: int,
        family: _Family,
        verb: Attend,
        arena: Arena,
        cancel: Cancel,
        recent: Recent | None,
    ):
        self.memory, self.sessions, self.layer, self.family = memory, sessions, layer, family
        self.options, self.placement, self.arena, self.cancel = verb.options, verb.placement, arena, cancel
        self.recent = recent
        self.provenance = Provenance()
        # Read once: sessions grow meanwhile, and every pass must see the same tokens.
        self.lengths = {name: session.tokens[layer] for name, session in sessions.items()}

    def answers(self) -> Iterator[tuple[_Member, Attended]]:
        """The answer of every member."""
        if not self.options.top_k:
            dense = Dense(self.family.queries, self.arena, self.cancel)
            if self.family.members[0].group.lse is not None:
                yield from self._shares(dense)
                return
            self._feed(dense, self.family.plan)
            partial = dense.partial()
            ledgers = self._ledgers(dense, partial.lse) if self.options.attribution else None
            for number, member in enumerate(self.family.members):
                attribution = None if ledgers is None else ledgers[number].attribution()
                yield member, self._answer(member, _rows(partial, member.rows), "dense", None, attribution)
            return
        best, name = self._again() or self._found()
        if self.family.counts is not None:
            best.keep(self.family.counts)
        partial = best.partial(self.options.logit_gap)
        exact = self._exact() if self.options.measure else None
        ranking = Ranking(self.provenance, best.scores, best.rows, partial.lse) if self.options.tokens else None
        for member in self.family.members:
            part = _rows(partial, member.rows)
            yield member, self._best_answer(best.narrow(member.rows), member, part, name, ranking, exact)

    def _found(self) -> tuple[TopK, str]:
        """The best keys, and who picked them."""
        plan = self.family.plan
        best = TopK(self.family.queries, self.options.top_k, self.arena, self.cancel)
        name = self._choose(plan)
        if name == "exact":
            self._feed(best, plan)
        else:
            for unit in plan.units:
                chunks, places = candidates(
                    self.memory, plan, unit, self.layer, self.family.queries, self.options, self.provenance
                )
                if chunks:
                    best.add_candidates(chunks, places)
            rest = tail(self.memory, plan)
            self._feed(best, rest)
            name += "+exact" if rest.tokens or any(m.group.scope.sessions for m in self.family.members) else ""
        if self.recent is not None and self.family.counts is None:
            for member in self.family.members:
                part = best.narrow(member.rows)
                found = Found(part.scores.clone(), part.rows.clone(), part.values.clone(), self.provenance, name)
                self.recent.keep(self._key(member), found)
        return best, name

    def _again(self) -> tuple[TopK, str] | None:
        """What the same question found a moment ago, if nothing changed since."""
        if self.recent is None or self.family.counts is None:
            return None
        found = [self.recent.take(self._key(member)) for member in self.family.members]
        first = found[0]
        if first is None or any(one is None or one.provenance is not first.provenance for one in found):
            return None
        known = [one for one in found if one is not None]
        best = TopK(self.family.queries, self.options.top_k, self.arena, self.cancel)
        best.scores = torch.cat([one.scores for one in known], dim=1)
        best.rows = torch.cat([one.rows for one in known], dim=1)
        best.values = torch.cat([one.values for one in known], dim=1)
        self.provenance = first.provenance
        return best, first.name

    def _key(self, member: _Member) -> Hashable:
        """Equal for equal questions to the same state of the memory."""
        scope, options = member.group.scope, self.options
        where = (self.memory.row.key, self.memory.version, self.layer, self.placement, scope.documents, scope.where)
        how = (options.top_k, options.engine, options.scale, tuple(sorted(options.search.items())))
        return (where, tuple(sorted(self._seen(member).items())), how, digest(member.group.queries))

    def _choose(self, plan: Plan) -> str:
        """Who picks the keys: "exact", or "index:" and the factories."""
        if self.options.engine is Engine.EXACT:
            return "exact"
        inside = covered(plan)
        if self.options.engine is Engine.INDEX and not inside and plan.tokens:
            raise FailedPrecondition(
                "no index covers any document of the scope; start the operation INDEX and wait for it, "
                "or ask for engine EXACT or AUTO"
            )
        if self.options.engine is Engine.AUTO and inside < _WORTH_INDEXING:
            return "exact"
        if not inside:
            return "exact"
        return "index:" + ",".join(dict.fromkeys(unit.factory for unit in plan.units))

    def _exact(self) -> TopK:
        exact = TopK(self.family.queries, self.options.top_k, self.arena, self.cancel)
        self._feed(exact, self.family.plan)
        exact.partial(self.options.logit_gap)
        return exact

    # --- Feeding ----------------------------------------------------------------------------------------------------

    def _feed(self, engine: TopK | Dense, plan: Plan) -> None:
        for chunk in self._document_chunks(plan):
            engine.add(chunk)
        for member in self.family.members:
            if member.group.scope.sessions:
                part = engine.narrow(member.rows)
                for chunk in self._session_chunks(member):
                    part.add(chunk)

    def _document_chunks(self, plan: Plan) -> Iterator[Chunk]:
        for slab, runs in plan.parts:
            self.cancel.check()
            yield slab.chunk(self.layer, runs, self.provenance.base(slab.locate))
        yield from self._cold_chunks(plan.cold)

    def _session_chunks(self, member: _Member) -> Iterator[Chunk]:
        for name, length in self._seen(member).items():
            session = self.sessions[name]
            for slab, runs, first in session.parts(self.layer, length):
                names = [session_source(session.id)]

                def locate(
                    rows: np.ndarray, first: int = first, names: list[str] = names
                ) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
                    return np.zeros(len(rows), np.int64), rows + first, names

                yield slab.chunk(self.layer, runs, self.provenance.base(locate))

    def _seen(self, member: _Member) -> dict[str, int]:
        """How many tokens of each session the member's scope shows; a session named twice counts once."""
        seen: dict[str, int] = {}
        for scope in member.group.scope.sessions:
            length = self.lengths[scope.id]
            seen[scope.id] = max(seen.get(scope.id, 0), length if scope.until is None else min(length, scope.until))
        return seen

    def _cold_chunks(self, documents: Sequence[LiveDocument]) -> Iterator[Chunk]:
        """Cold documents from disk, many small ones together; each chunk reuses the memory of the one before."""
        if not documents:
            return
        spec = self.memory.spec
        per_token = 2 * spec.kv_heads * spec.head_dim * spec.dtype.itemsize
        capacity = max(1, _COLD_BYTES // per_token)
        shape = (2, spec.kv_heads, min(capacity, sum(d.row.tokens for d in documents)), spec.head_dim)
        both = self.arena.take("cold", shape, spec.dtype.torch, torch.device("cpu"))
        starts: list[int] = []
        names: list[str] = []
        offsets: list[int] = []
        filled = 0
        for document in documents:
            for first, keys, values in self.memory.read_cold(document, self.layer, 0, document.row.tokens):
                self.cancel.check()
                done, count = 0, keys.shape[1]
                while done < count:
                    size = min(count - done, shape[2] - filled)
                    both[0, :, filled : filled + size] = keys[:, done : done + size]
                    both[1, :, filled : filled + size] = values[:, done : done + size]
                    starts.append(filled)
                    names.append(document.row.id)
                    offsets.append(first + done)
                    done, filled = done + size, filled + size
                    if filled == shape[2]:
                        yield self._cold_chunk(both, filled, starts, names, offsets)
                        starts, names, offsets, filled = [], [], [], 0
        if filled:
            yield self._cold_chunk(both, filled, starts, names, offsets)

    def _cold_chunk(self, both: Tensor, filled: int, starts: list[int], names: list[str], offsets: list[int]) -> Chunk:
        begin, token = np.array(starts), np.array(offsets)

        def locate(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
            place = np.searchsorted(begin, rows, side="right") - 1
            return place, rows - begin[place] + token[place], names

        device = self.family.queries.device
        keys, values = both[0].to(device), both[1].to(device)
        norms = largest_norms(both[0][:, :filled]).to(device)
        return Chunk(keys, values, ((0, filled),), norms, self.provenance.base(locate))

    # --- Answers ----------------------------------------------------------------------------------------------------

    def _shares(self, dense: Dense) -> Iterator[tuple[_Member, Attended]]:
        """Only the masses, of wholes whose denominators the caller knows."""
        heads = self.memory.spec.kv_heads
        given = [member.group.lse for member in self.family.members]
        lses = [one.to(dense.queries.device).reshape(heads, -1) for one in given if one is not None]
        lse = torch.cat(lses, dim=1)
        # A row that sees nothing anywhere gives no mass to what was written since.
        ledgers = self._ledgers(dense, lse.masked_fill(lse == -torch.inf, torch.inf))
        for member, own, ledger in zip(self.family.members, lses, ledgers, strict=True):
            partial = Partial(torch.zeros_like(dense.queries[:, member.rows]), own)
            yield member, self._answer(member, partial, "dense", None, ledger.means(own.numel()))

    def _ledgers(self, dense: Dense, lse: Tensor) -> list[Ledger]:
        """The mass of every source for every member, by the denominators [H, R] of all their rows."""
        members = self.family.members
        ledgers = [Ledger(self.provenance) for _ in members]
        for chunk in self._document_chunks(self.family.plan):
            rows = chunk.rows(torch.arange(chunk.size, device=dense.queries.device)) + chunk.base
            sources, _, names = self.provenance.sources(rows.cpu().numpy())
            place = torch.from_numpy(sources).to(dense.queries.device)
            some = max(1, _MASSES // max(1, chunk.size))
            for start in range(0, len(members), some):
                part = members[start : start + some]
                whole = slice(part[0].rows.start, part[-1].rows.stop)
                within = [slice(one.rows.start - whole.start, one.rows.stop - whole.start) for one in part]
                masses = dense.narrow(whole).masses(chunk, lse[:, whole], within)
                sums = masses.new_zeros(len(part), len(names), dtype=torch.float64)
                sums.index_add_(1, place, masses.double())
                for ledger, row in zip(ledgers[start : start + some], sums.cpu().numpy(), strict=True):
                    ledger.credit(names, row)
        for member, ledger in zip(members, ledgers, strict=True):
            for chunk in self._session_chunks(member):
                rows = chunk.rows(torch.arange(chunk.size, device=dense.queries.device)) + chunk.base
                ledger.add(rows, dense.narrow(member.rows).mass(chunk, lse[:, member.rows]))
        return ledgers

    def _best_answer(
        self, best: TopK, member: _Member, partial: Partial, name: str, ranking: Ranking | None, exact: TopK | None
    ) -> Attended:
        heads = member.group.queries.shape[0]
        tokens = attribution = measured = None
        if ranking is not None:
            tokens = ranking.top_tokens(member.rows, heads)
        if self.options.attribution:
            ledger = Ledger(self.provenance)
            lse = partial.lse.masked_fill(partial.lse == -torch.inf, 0)
            ledger.add(best.rows, (best.scores - lse[..., None]).exp())
            attribution = ledger.attribution()
        if exact is not None:
            measured = _measure(self.provenance, best, exact.narrow(member.rows))
        return self._answer(member, partial, name, tokens, attribution, measured)

    def _answer(
        self,
        member: _Member,
        partial: Partial,
        name: str,
        top: TopTokens | None = None,
        attribution: tuple[Attribution, ...] | None = None,
        measured: Measured | None = None,
    ) -> Attended:
        heads, count, dim = member.group.queries.shape
        output = partial.output.reshape(heads, count, dim).to(self.options.output_dtype.torch).cpu()
        lse = partial.lse.reshape(heads, count).cpu()
        tokens = self.family.plan.tokens + sum(self._seen(member).values())
        return Attended(output, lse, Coverage(tokens, tokens), name, top, attribution, measured)


def _rows(partial: Partial, rows: slice) -> Partial:
    return Partial(partial.output[:, rows], partial.lse[:, rows])


def _measure(provenance: Provenance, best: TopK, exact: TopK) -> Measured:
    """Share of the exact top k that was found, and of its softmax mass; 1 where there was nothing to find."""
    names: dict[str, int] = {}
    wanted, found = (_identities(provenance, engine.rows, names) for engine in (exact, best))
    hits = total = 0
    for want, have in zip(wanted, found, strict=True):
        keys = set(want[want >= 0].tolist())
        hits += len(keys & set(have[have >= 0].tolist()))
        total += len(keys)
    mass = (best.scores.logsumexp(2) - exact.scores.logsumexp(2)).exp().nan_to_num(1.0)
    return Measured(hits / total if total else 1.0, float(mass.mean()))


def _identities(provenance: Provenance, rows: Tensor, names: dict[str, int]) -> np.ndarray:
    """One number a token, the same whichever part of the scope it was found in: [H·R, K]."""
    source, offset, _ = provenance.sources(rows.cpu().numpy().reshape(-1, rows.shape[2]), names)
    return np.where(source >= 0, (source << 40) + offset, -1)
