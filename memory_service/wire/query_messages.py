"""Filters, scopes, queries and their answers as protobuf messages, and back, as in `messages`."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType

import torch

from memory_service.errors import InvalidArgument
from memory_service.types.answers import Attended, Attribution, Coverage, Measured, TopTokens
from memory_service.types.conditions import AllOf, AnyOf, Compare, Condition, Filter, Not
from memory_service.types.questions import MAX_GROUPS, AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope, SessionScope
from memory_service.types.specs import DType
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire.messages import DTYPE, by_number, check_count, read_scalar, read_word, write_scalar
from memory_service.wire.tensors import read_tensor, write_tensor

MAX_FILTER_DEPTH = 32
MAX_FILTER_PARTS = 1024

ENGINE = {Engine.AUTO: pb.ENGINE_AUTO, Engine.EXACT: pb.ENGINE_EXACT, Engine.INDEX: pb.ENGINE_INDEX}
COMPARE = {
    Compare.EQ: pb.COMPARE_EQ,
    Compare.NE: pb.COMPARE_NE,
    Compare.LT: pb.COMPARE_LT,
    Compare.LE: pb.COMPARE_LE,
    Compare.GT: pb.COMPARE_GT,
    Compare.GE: pb.COMPARE_GE,
    Compare.IN: pb.COMPARE_IN,
    Compare.EXISTS: pb.COMPARE_EXISTS,
}
ENGINES = by_number(ENGINE, Engine.AUTO)
COMPARES = by_number(COMPARE)
OUTPUT_DTYPES = by_number(DTYPE, DType.F32)

# --- Filters and scopes ---------------------------------------------------------------------------------------------


def write_filter(where: Filter) -> pb.Filter:
    if isinstance(where, Condition):
        values = [write_scalar(value) for value in where.values]
        return pb.Filter(condition=pb.Condition(key=where.key, compare=COMPARE[where.compare], values=values))
    if isinstance(where, Not):
        return pb.Filter(negated=write_filter(where.part))
    parts = pb.Filters(parts=[write_filter(part) for part in where.parts])
    return pb.Filter(all_of=parts) if isinstance(where, AllOf) else pb.Filter(any_of=parts)


def read_filter(message: pb.Filter) -> Filter:
    """The filter of a message. Raises InvalidArgument if it is too deep, too large or says nothing."""
    return _FilterReader().read(message, 1)


class _FilterReader:
    """Counts the parts of one filter while it is read."""

    def __init__(self) -> None:
        self.parts = 0

    def read(self, message: pb.Filter, depth: int) -> Filter:
        self.parts += 1
        if depth > MAX_FILTER_DEPTH or self.parts > MAX_FILTER_PARTS:
            raise InvalidArgument(f"a filter may be {MAX_FILTER_DEPTH} deep and have {MAX_FILTER_PARTS} parts")
        match message.WhichOneof("kind"):
            case "condition":
                return self._condition(message.condition)
            case "negated":
                return Not(self.read(message.negated, depth + 1))
            case "all_of":
                return AllOf(tuple(self.read(part, depth + 1) for part in message.all_of.parts))
            case "any_of":
                return AnyOf(tuple(self.read(part, depth + 1) for part in message.any_of.parts))
            case _:
                raise InvalidArgument("a part of the filter is empty")

    def _condition(self, message: pb.Condition) -> Condition:
        compare = read_word(COMPARES, message.compare, "condition.compare")
        wanted = {Compare.IN: range(MAX_FILTER_PARTS + 1), Compare.EXISTS: range(1)}.get(compare, range(1, 2))
        if len(message.values) not in wanted:
            raise InvalidArgument(f"a condition with {compare.name} cannot have {len(message.values)} values")
        return Condition(message.key, compare, tuple(read_scalar(value) for value in message.values))


_EVERYTHING = Scope()


def write_scope(scope: Scope, message: pb.Scope) -> None:
    """Fill a part of a message."""
    if scope.documents is not None:
        message.documents.SetInParent()  # Present, even if empty: no documents is not all documents.
        message.documents.ids.extend(scope.documents)
    if scope.where is not None:
        message.where.CopyFrom(write_filter(scope.where))
    for one in scope.sessions:
        message.sessions.add(id=one.id, until=one.until, at_least=one.at_least)


def read_scope(message: pb.Scope) -> Scope:
    check_count(len(message.sessions), MAX_GROUPS, "scope.sessions")
    return Scope(
        documents=tuple(message.documents.ids) if message.HasField("documents") else None,
        where=read_filter(message.where) if message.HasField("where") else None,
        sessions=tuple(map(_read_session_scope, message.sessions)),
    )


def _read_session_scope(message: pb.SessionScope) -> SessionScope:
    return SessionScope(message.id, message.until if message.HasField("until") else None, message.at_least)


# --- Attention ------------------------------------------------------------------------------------------------------


def write_options(options: AttendOptions, message: pb.AttendOptions) -> None:
    """Fill a part of a message."""
    message.top_k = options.top_k
    message.engine = ENGINE[options.engine]
    if options.scale is not None:
        message.scale = options.scale
    if options.logit_gap is not None:
        message.logit_gap = options.logit_gap
    message.search.update(options.search)
    message.tokens = options.tokens
    message.attribution = options.attribution
    message.measure = options.measure
    message.output_dtype = DTYPE[options.output_dtype]


def read_options(message: pb.AttendOptions) -> AttendOptions:
    # A worker attends with the same options every time, and reading them costs more than the rest of a small request.
    raw = message.SerializeToString()
    return _known_options(raw) if len(raw) <= _KNOWN_BYTES else _read_options(message)


_KNOWN_BYTES = 256


@lru_cache(maxsize=1024)
def _known_options(raw: bytes) -> AttendOptions:
    return _read_options(pb.AttendOptions.FromString(raw))


def _read_options(message: pb.AttendOptions) -> AttendOptions:
    return AttendOptions(
        top_k=message.top_k,
        engine=read_word(ENGINES, message.engine, "options.engine"),
        scale=message.scale if message.HasField("scale") else None,
        logit_gap=message.logit_gap if message.HasField("logit_gap") else None,
        search=MappingProxyType(dict(message.search)),  # It is shared by all who ask alike.
        tokens=message.tokens,
        attribution=message.attribution,
        measure=message.measure,
        output_dtype=read_word(OUTPUT_DTYPES, message.output_dtype, "options.output_dtype"),
    )


def write_group(group: AttendGroup, message: pb.AttendGroup) -> None:
    """Fill a part of a message."""
    write_scope(group.scope, message.scope)
    write_tensor(group.queries, message.queries)
    if group.counts is not None:
        write_tensor(group.counts, message.share.counts)
    if group.lse is not None:
        write_tensor(group.lse, message.share.lse)


def read_group(message: pb.AttendGroup) -> AttendGroup:
    scope = read_scope(message.scope) if message.HasField("scope") else _EVERYTHING
    counts = lse = None
    if message.share.HasField("counts"):
        counts = read_tensor(message.share.counts, "counts", "[G, Q]", (torch.int32,))
    if message.share.HasField("lse"):
        lse = read_tensor(message.share.lse, "lse", "[G, Q]", (torch.float32,))
    return AttendGroup(scope, read_tensor(message.queries, "queries", "[G, Q, D]"), counts, lse)


def write_top_tokens(tokens: TopTokens, message: pb.TopTokens) -> None:
    """Fill a part of a message."""
    message.sources.extend(tokens.sources)
    write_tensor(tokens.source, message.source)
    write_tensor(tokens.offset, message.offset)
    write_tensor(tokens.score, message.score)
    write_tensor(tokens.weight, message.weight)


def read_top_tokens(message: pb.TopTokens) -> TopTokens:
    return TopTokens(
        sources=tuple(message.sources),
        source=read_tensor(message.source, "source", "[G, Q, K]", (torch.int32,)),
        offset=read_tensor(message.offset, "offset", "[G, Q, K]", (torch.int64,)),
        score=read_tensor(message.score, "score", "[G, Q, K]"),
        weight=read_tensor(message.weight, "weight", "[G, Q, K]"),
    )


def write_attended(answer: Attended, message: pb.Attended) -> None:
    """Fill a part of a message."""
    write_tensor(answer.output, message.output)
    write_tensor(answer.lse, message.lse)
    message.coverage.searched = answer.coverage.searched
    message.coverage.in_scope = answer.coverage.in_scope
    message.engine = answer.engine
    if answer.tokens is not None:
        write_top_tokens(answer.tokens, message.tokens)
    if answer.attribution is not None:
        message.attribution.SetInParent()
        for one in answer.attribution:
            message.attribution.masses.add(source=one.source, mass=one.mass)
    if answer.measured is not None:
        message.measured.recall = answer.measured.recall
        message.measured.captured_mass = answer.measured.captured_mass
        message.measured.SetInParent()


def read_attended(message: pb.Attended) -> Attended:
    tokens = attribution = measured = None
    if message.HasField("tokens"):
        tokens = read_top_tokens(message.tokens)
    if message.HasField("attribution"):
        attribution = tuple(Attribution(one.source, one.mass) for one in message.attribution.masses)
    if message.HasField("measured"):
        measured = Measured(message.measured.recall, message.measured.captured_mass)
    return Attended(
        output=read_tensor(message.output, "output", "[G, Q, D]"),
        lse=read_tensor(message.lse, "lse", "[G, Q]"),
        coverage=Coverage(message.coverage.searched, message.coverage.in_scope),
        engine=message.engine,
        tokens=tokens,
        attribution=attribution,
        measured=measured,
    )
