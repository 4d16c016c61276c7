"""What is asked of a memory.

G query heads, Q queries, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from memory_service.errors import InvalidArgument
from memory_service.types.brief import brief
from memory_service.types.scopes import Scope
from memory_service.types.specs import DType

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOP_K = 4096
MAX_QUERIES = 65_536  # query rows (query heads times queries) of one group
MAX_GROUPS = 4096


class Engine(StrEnum):
    """Who picks the keys of the top k. `AUTO` lets the service choose by size and scope."""

    AUTO = "auto"
    EXACT = "exact"
    INDEX = "index"


@dataclass(frozen=True, slots=True)
class AttendOptions:
    """How to attend; the same for all groups of a call."""

    top_k: int = 0  # 0: dense, softmax over every key in scope; else over the k highest-scoring keys.
    engine: Engine = Engine.AUTO  # Dense is always exact.
    scale: float | None = None  # score = q·k·scale; None: head_dim ** -0.5.
    logit_gap: float | None = None  # With top_k: drop keys whose score is more than this below the best one.
    search: Mapping[str, float] = field(default_factory=dict)  # Of the index: nprobe, efSearch, candidates.
    tokens: bool = False  # Also return the top tokens with their weights (needs top_k).
    attribution: bool = False  # Also return the softmax mass per document and session.
    measure: bool = False  # Also run exact and report the index's recall and captured mass.
    output_dtype: DType = DType.F32

    def check(self) -> None:
        """Raise InvalidArgument unless every field is within its limits."""
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise InvalidArgument(f"top_k must be 0 (dense) to {MAX_TOP_K}, got {self.top_k}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise InvalidArgument(f"scale must be finite and > 0, got {self.scale}")
        if self.logit_gap is not None and not (self.logit_gap >= 0 and self.top_k):
            raise InvalidArgument("logit_gap must be ≥ 0 and needs top_k ≥ 1")
        if self.tokens and not self.top_k:
            raise InvalidArgument("tokens needs top_k ≥ 1: dense attention has no top tokens")
        if self.engine is Engine.INDEX and not self.top_k:
            raise InvalidArgument("engine INDEX needs top_k ≥ 1: dense attention reads every key")


@dataclass(frozen=True, slots=True, eq=False)
class AttendGroup:
    """Queries that share a scope, rotated to their place by the caller.

    `counts` and `lse` are for who joins the answers of several memories: how many of the top k the others leave to this
    one, and the denominator of the whole, against which attribution is then measured instead of against this part's.
    """

    scope: Scope
    queries: Tensor  # [G, Q, D] float32 (bf16/f16 are converted)
    counts: Tensor | None = None  # [G, Q] int32, 0 to top_k: only so many of the best take part.
    lse: Tensor | None = None  # [G, Q] float32: no output, only attribution, and its masses are not scaled to 1.

    __repr__ = brief
