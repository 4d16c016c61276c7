"""Calls too large for one message, cut into several; and their answers, joined into the one the caller asked for.

Queries are independent of each other, so an attend cut along them and joined again is the same attend, bit for bit.
G query heads, Q queries, D head_dim, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from memory_service.types.answers import Attended, Attribution, Measured, TopTokens
from memory_service.types.questions import MAX_QUERIES, AttendGroup, AttendOptions
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.verbs import AppendSessions, Attend, Search

PIECE_BYTES = 4 << 20  # Of tensors in one message, asked or answered; the service takes messages of 8 MiB.
WORKING_BYTES = 128 << 20  # That one message may cost the service, which refuses what would take too much at once.
TOKEN_BYTES = 4 + 8 + 4 + 4  # Of one top token: source, offset, score, weight.

Asked = TypeVar("Asked", Attend, Search)
Answer = TypeVar("Answer", Attended, TopTokens)


class Piece(NamedTuple):
    """A run of a call's item (queries of a group, tokens of an append)."""

    item: int
    first: int
    stop: int


def plan(lengths: Sequence[int], unit_bytes: Sequence[int], limit: int = PIECE_BYTES) -> list[list[Piece]]:
    """Pack items of `lengths` units of `unit_bytes` each into messages of at most `limit` bytes, in order.

    A unit is never cut, so a unit above the limit gets a message to itself.
    """
    messages: list[list[Piece]] = [[]]
    room = limit
    for item, (length, unit) in enumerate(zip(lengths, unit_bytes, strict=True)):
        first = 0
        while first < length or length == 0:
            fits = room // max(unit, 1)
            if fits < 1 and messages[-1]:
                messages.append([])
                room = limit
                continue
            stop = min(length, first + max(fits, 1))
            messages[-1].append(Piece(item, first, stop))
            room -= unit * (stop - first)
            first = stop
            if length == 0:
                break
    return messages


def cut_attend(verb: Asked, limit: int = PIECE_BYTES) -> tuple[list[list[Piece]], list[Asked]]:
    """The messages of an attend or search. Usually one: the verb itself."""
    answers_values = isinstance(verb, Attend)
    costs = [_query_bytes(group, verb.options, answers_values) for group in verb.groups]
    messages = plan([_queries(group) for group in verb.groups], costs, limit)
    if len(messages) == 1:
        return messages, [verb]
    return messages, [
        replace(
            verb,
            groups=tuple(_cut_group(verb.groups[piece.item], piece) for piece in pieces),
        )
        for pieces in messages
    ]


def join_attended(messages: list[list[Piece]], answers: Sequence[tuple[Attended, ...]]) -> tuple[Attended, ...]:
    """One answer a group, from the answers to its pieces."""
    return _join(messages, answers, _join_one_attended)


def join_top_tokens(messages: list[list[Piece]], answers: Sequence[tuple[TopTokens, ...]]) -> tuple[TopTokens, ...]:
    """One answer a group, from the answers to its pieces."""
    return _join(messages, answers, lambda parts, _: _join_one_top_tokens(parts))


def cut_appends(verb: AppendSessions, limit: int = PIECE_BYTES) -> tuple[list[list[Piece]], list[AppendSessions]]:
    """The messages of an append, to be sent in order. Repeating any of them is harmless."""
    costs = [_token_bytes(append) for append in verb.appends]
    lengths = [append.keys.shape[2] if append.keys.ndim == 4 else 0 for append in verb.appends]
    messages = plan(lengths, costs, limit)
    if len(messages) == 1:
        return messages, [verb]
    return messages, [
        replace(verb, appends=tuple(_cut_append(verb.appends[piece.item], piece) for piece in pieces))
        for pieces in messages
    ]


def join_appends(messages: list[list[Piece]], answers: Sequence[tuple[SessionInfo, ...]]) -> tuple[SessionInfo, ...]:
    """One answer an append: that to its last piece."""
    last = {
        piece.item: info
        for pieces, infos in zip(messages, answers, strict=True)
        for piece, info in zip(pieces, infos, strict=True)
    }
    return tuple(last[item] for item in sorted(last))


def _cut_group(group: AttendGroup, piece: Piece) -> AttendGroup:
    run = slice(piece.first, piece.stop)
    return replace(
        group,
        queries=group.queries[:, run],
        counts=None if group.counts is None else group.counts[:, run],
        lse=None if group.lse is None else group.lse[:, run],
    )


def _queries(group: AttendGroup) -> int:
    return group.queries.shape[1] if group.queries.ndim == 3 else 0


def _query_bytes(group: AttendGroup, options: AttendOptions, answers_values: bool) -> int:
    """Bytes of one query of all heads: asked, answered, or its share of working memory, whichever is most."""
    heads, dim = (group.queries.shape[0], group.queries.shape[-1]) if group.queries.ndim else (1, 1)
    answered = options.output_dtype.itemsize * dim + 4 if answers_values else 0
    if options.tokens or not answers_values:
        answered += options.top_k * TOKEN_BYTES
    gathered = options.top_k * (8 * dim + 32)
    # The last keeps a message within MAX_QUERIES rows, however short they are.
    return heads * max(4 * dim, answered, gathered * PIECE_BYTES // WORKING_BYTES, PIECE_BYTES // MAX_QUERIES)


def _token_bytes(append: SessionAppend) -> int:
    tokens = append.keys.shape[2] if append.keys.ndim == 4 else 0
    return (append.keys.nbytes + append.values.nbytes) // max(tokens, 1) + 8


def _cut_append(append: SessionAppend, piece: Piece) -> SessionAppend:
    run = slice(piece.first, piece.stop)
    return replace(
        append,
        first_token=append.first_token + piece.first,
        keys=append.keys[:, :, run],
        values=append.values[:, :, run],
        token_ids=None if append.token_ids is None else append.token_ids[run],
    )


def _join(
    messages: list[list[Piece]],
    answers: Sequence[tuple[Answer, ...]],
    join_one: Callable[[list[Answer], list[int]], Answer],
) -> tuple[Answer, ...]:
    parts: dict[int, list[Answer]] = {}
    weights: dict[int, list[int]] = {}
    for pieces, answered in zip(messages, answers, strict=True):
        for piece, answer in zip(pieces, answered, strict=True):
            parts.setdefault(piece.item, []).append(answer)
            weights.setdefault(piece.item, []).append(piece.stop - piece.first)
    return tuple(join_one(parts[item], weights[item]) if len(parts[item]) > 1 else parts[item][0] for item in parts)


def _join_one_attended(parts: list[Attended], weights: list[int]) -> Attended:
    tops = [part.tokens for part in parts if part.tokens is not None]
    measured = [part.measured for part in parts if part.measured is not None]
    return replace(
        parts[0],
        output=torch.cat([part.output for part in parts], dim=1),
        lse=torch.cat([part.lse for part in parts], dim=1),
        tokens=_join_one_top_tokens(tops) if tops else None,
        attribution=None if parts[0].attribution is None else _join_attribution(parts, weights),
        measured=_join_measured(measured, weights) if measured else None,
    )


def _join_measured(parts: list[Measured], weights: list[int]) -> Measured:
    return Measured(
        recall=_mean([part.recall for part in parts], weights),
        captured_mass=_mean([part.captured_mass for part in parts], weights),
    )


def _join_attribution(parts: list[Attended], weights: list[int]) -> tuple[Attribution, ...]:
    masses: dict[str, float] = {}
    for part, weight in zip(parts, weights, strict=True):
        for one in part.attribution or ():
            masses[one.source] = masses.get(one.source, 0.0) + one.mass * weight / sum(weights)
    return tuple(Attribution(source, mass) for source, mass in sorted(masses.items(), key=lambda pair: -pair[1]))


def _join_one_top_tokens(parts: list[TopTokens]) -> TopTokens:
    sources = tuple(dict.fromkeys(source for part in parts for source in part.sources))
    place = {source: index for index, source in enumerate(sources)}
    numbered = []
    for part in parts:
        # The last entry is where padding's -1 points.
        renumber = torch.tensor([*(place[source] for source in part.sources), -1], dtype=part.source.dtype)
        numbered.append(renumber[part.source.long()])
    return TopTokens(
        sources=sources,
        source=torch.cat(numbered, dim=1),
        offset=torch.cat([part.offset for part in parts], dim=1),
        score=torch.cat([part.score for part in parts], dim=1),
        weight=torch.cat([part.weight for part in parts], dim=1),
    )


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / max(sum(weights), 1)
