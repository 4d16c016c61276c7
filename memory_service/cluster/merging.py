"""Answers of several shards to the same queries, joined into the one a single memory would have given.

G query heads, Q queries, D head_dim, K top_k, S shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memory_service.attention.exact import merge
from memory_service.types.answers import Attended, Attribution, Coverage, Measured, Partial, TopTokens
from memory_service.types.questions import AttendOptions

_SOURCES = 1000  # Named in an attribution, as a single memory does.
_SHIFT = 40  # Offsets stay below 2**40.


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """The best tokens of all shards together."""

    tokens: TopTokens  # Without weights yet.
    shard: Tensor  # [G, Q, K] which shard's token it is; -1 is padding

    def counts(self, shards: int) -> list[Tensor]:
        """How many of the best are each shard's: [G, Q] int32."""
        return [(self.shard == number).sum(2, dtype=torch.int32) for number in range(shards)]


def rank(found: Sequence[TopTokens], top_k: int, logit_gap: float | None = None) -> Ranking:
    """The `top_k` best of what every shard found, ties by source and offset, less what is `logit_gap` below the best.

    Nothing that belongs to the best of all can be missing from the best of its shard.
    """
    names = sorted({source for one in found for source in one.sources})
    place = {source: number for number, source in enumerate(names)}
    score = torch.cat([one.score for one in found], dim=2)
    offset = torch.cat([one.offset for one in found], dim=2)
    source = torch.cat([_renumbered(one, place) for one in found], dim=2)
    shard = torch.cat([torch.full_like(one.source, number) for number, one in enumerate(found)], dim=2)
    # Stable sorts, the least important first.
    order = ((source.long() << _SHIFT) + offset).sort(dim=2, stable=True).indices
    order = order.gather(2, score.gather(2, order).sort(dim=2, descending=True, stable=True).indices)[:, :, :top_k]
    score, offset, source, shard = (one.gather(2, order) for one in (score, offset, source, shard))
    lost = score == -torch.inf
    if logit_gap is not None:
        lost |= score < score[:, :, :1] - logit_gap
    tokens = TopTokens(
        tuple(names),
        source.masked_fill(lost, -1),
        offset.masked_fill(lost, -1),
        score.masked_fill(lost, -torch.inf),
        torch.zeros_like(score),
    )
    return Ranking(tokens, shard.masked_fill(lost, -1))


def share(answer: Attended, counts: Tensor) -> Attended | None:
    """A shard's answer if only its `counts` [G, Q] best tokens take part; None if the shard must be asked again."""
    assert answer.tokens is not None
    available = (answer.tokens.score > -torch.inf).sum(2)
    if bool(((counts > 0) & (counts < available)).any()):
        return None
    none = counts == 0
    return replace(
        answer,
        output=answer.output.masked_fill(none[..., None], 0),
        lse=answer.lse.masked_fill(none, -torch.inf),
    )


def weighted(tokens: TopTokens, lse: Tensor | None = None) -> TopTokens:
    """The tokens with their softmax weights, over themselves or by a denominator [G, Q]."""
    lse = tokens.score.logsumexp(2) if lse is None else lse
    weight = (tokens.score - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return replace(tokens, weight=weight)


def trimmed(tokens: TopTokens) -> TopTokens:
    """Without the names of sources no token is of."""
    used = torch.unique(tokens.source[tokens.source >= 0]).tolist()
    renumber = torch.full((len(tokens.sources) + 1,), -1, dtype=tokens.source.dtype)
    for number, source in enumerate(used):
        renumber[source] = number
    sources = tuple(tokens.sources[source] for source in used)
    return replace(tokens, sources=sources, source=renumber[tokens.source.long()])


def joined(parts: Sequence[Attended], tokens: TopTokens | None, options: AttendOptions) -> Attended:
    """One answer, from every shard's share; attribution of a top k comes from its `tokens`."""
    partial = merge([part.partial for part in parts])
    coverage = Coverage(sum(part.coverage.searched for part in parts), sum(part.coverage.in_scope for part in parts))
    top = None if tokens is None else trimmed(weighted(tokens, partial.lse))
    return Attended(
        partial.output.to(options.output_dtype.torch),
        partial.lse,
        coverage,
        _engine([part.engine for part in parts]),
        top if options.tokens else None,
        attributed(top) if options.attribution and top is not None else None,
    )


def nothing(queries: Tensor, options: AttendOptions) -> Attended:
    """The answer where no key can be seen."""
    heads, count, dim = queries.shape
    partial = Partial(torch.zeros(heads, count, dim), torch.full((heads, count), -torch.inf))
    tokens = attribution = None
    if options.tokens:
        shape = (heads, count, options.top_k)
        none = torch.full(shape, -1, dtype=torch.int32)
        tokens = TopTokens((), none, none.long(), torch.full(shape, -torch.inf), torch.zeros(shape))
    if options.attribution:
        attribution = ()
    output = partial.output.to(options.output_dtype.torch)
    engine = "exact" if options.top_k else "dense"
    return Attended(output, partial.lse, Coverage(0, 0), engine, tokens, attribution)


def attributed(tokens: TopTokens) -> tuple[Attribution, ...]:
    """Mass by source of a weighted top k."""
    here = tokens.source >= 0
    sums = torch.zeros(len(tokens.sources), dtype=torch.float64)
    sums.index_add_(0, tokens.source[here].long(), tokens.weight[here].double())
    return _scaled(dict(zip(tokens.sources, sums.tolist(), strict=True)), float(sums.sum()))


def together(parts: Sequence[Sequence[Attribution]], lse: Tensor) -> tuple[Attribution, ...]:
    """Mass by source of a dense answer, from the masses [means over rows] every shard measured against its `lse`."""
    masses: dict[str, float] = {}
    for part in parts:
        for one in part:
            masses[one.source] = masses.get(one.source, 0.0) + one.mass
    # A row that sees anything has a mass of 1, also if a shard did not name all its sources.
    return _scaled(masses, float((lse > -torch.inf).double().mean()))


def measured(found: Attended, exact: Attended) -> Measured:
    """What approximation cost: share of the exact top k that was found, and of its mass."""
    assert found.tokens is not None
    assert exact.tokens is not None
    names = sorted({*found.tokens.sources, *exact.tokens.sources})
    place = {source: number for number, source in enumerate(names)}
    wanted, have = (_identities(one, place) for one in (exact.tokens, found.tokens))
    hits = total = 0
    for want, got in zip(wanted.tolist(), have.tolist(), strict=True):
        keys = {key for key in want if key >= 0}
        hits += len(keys & set(got))
        total += len(keys)
    mass = (found.lse - exact.lse).exp().nan_to_num(1.0)
    return Measured(hits / total if total else 1.0, float(mass.mean()))


def _identities(tokens: TopTokens, place: dict[str, int]) -> Tensor:
    source = _renumbered(tokens, place).long()
    return torch.where(source >= 0, (source << _SHIFT) + tokens.offset, -1).flatten(0, 1)


def _renumbered(tokens: TopTokens, place: dict[str, int]) -> Tensor:
    # The last entry is where padding's -1 points.
    renumber = torch.tensor([*(place[source] for source in tokens.sources), -1], dtype=tokens.source.dtype)
    return renumber[tokens.source.long()]


def _scaled(masses: dict[str, float], total: float) -> tuple[Attribution, ...]:
    ranked = sorted(masses.items(), key=lambda item: -item[1])[:_SOURCES]
    return tuple(Attribution(source, mass / total) for source, mass in ranked if mass > 0 and total > 0)


def _engine(engines: Sequence[str]) -> str:
    """One name for how the shards found their keys: "index:…" before "+exact"."""
    words = dict.fromkeys(word for engine in engines for word in engine.split("+"))
    indexes = dict.fromkeys(
        factory for word in words if word.startswith("index:") for factory in word.removeprefix("index:").split(",")
    )
    plain = [word for word in words if not word.startswith("index:")]
    return "+".join([*(["index:" + ",".join(indexes)] if indexes else []), *plain])
