"""What a memory answers.

G query heads, H key/value heads, T tokens, Q queries, D head_dim, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from memory_service.types.brief import brief

if TYPE_CHECKING:
    from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys a query may see."""

    output: Tensor  # [G, Q, D] float32, normalised over these keys alone; 0 if no key was visible
    lse: Tensor  # [G, Q] float32, log of the softmax denominator; -inf if no key was visible


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the scope was looked at."""

    searched: int
    in_scope: int
    missing: tuple[str, ...] = ()  # Shards of a cluster that could not be asked.

    @property
    def fraction(self) -> float:
        return self.searched / self.in_scope if self.in_scope else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """The tokens that took part, best first; padding has source -1, offset -1 and weight 0."""

    sources: tuple[str, ...]  # Document ids, or session ids written "session:<id>".
    source: Tensor  # [G, Q, K] int32, index into `sources`
    offset: Tensor  # [G, Q, K] int64, token offset in its document or session
    score: Tensor  # [G, Q, K] float32, scaled logit; -inf for padding
    weight: Tensor  # [G, Q, K] float32, softmax weight over the keys that took part

    __repr__ = brief


@dataclass(frozen=True, slots=True)
class Attribution:
    """Softmax mass of one document or session, mean over query heads and queries; all masses sum to 1."""

    source: str
    mass: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What approximation cost in this call, against the exact top k; means over query heads and queries."""

    recall: float
    captured_mass: float  # Softmax mass of the retrieved keys over the mass of the exact top k.


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """The answer to one group."""

    output: Tensor  # [G, Q, D]
    lse: Tensor  # [G, Q] float32
    coverage: Coverage
    engine: str  # "dense", "exact", or "index:<factory>" with "+exact" for the scanned tail.
    tokens: TopTokens | None = None
    attribution: tuple[Attribution, ...] | None = None
    measured: Measured | None = None

    __repr__ = brief

    @property
    def partial(self) -> Partial:
        return Partial(self.output, self.lse)


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """Raw keys and values of consecutive tokens of a document or session, one layer."""

    keys: Tensor  # [H, T, D] in the memory's dtype
    values: Tensor  # [H, T, D]
    token_ids: Tensor  # [T] int64
    first_token: int

    __repr__ = brief
