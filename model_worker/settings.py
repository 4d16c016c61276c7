"""How a decoder gets its memory, and how the memory is read: frozen values, checked where they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from memory_service import ALL_DOCUMENTS, Attended, AttendOptions, DType, Engine, Scope, ScopeLike, Where, scope_of
from memory_service.client.arguments import options_of
from memory_service.errors import InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor


class Overflow(StrEnum):
    """What leaves a full window."""

    SLIDE = "slide"  # The oldest tokens, so that `last_context_length` stay.
    FLUSH = "flush"  # All of it, as LongLLaMA's authors do.


class Cut(StrEnum):
    """Where a batch of prompts of unequal lengths is cut into windows."""

    ROW = "row"  # Each row by its own tokens: a row in a batch equals the row alone.
    BATCH = "batch"  # All rows by the padded length, as LongLLaMA's authors do.


class LogitScaling(StrEnum):
    """How Self-Extend sharpens the logits of far queries."""

    NONE = "none"
    LOG = "log"  # max(1, ln(position + 1) / ln(base))
    YARN = "yarn"  # max(1, (0.1 ln((position + 1) / base) + 1)²)


class MemoryPosition(StrEnum):
    """Where a query sees the keys of the memory."""

    FIRST = "first"  # At the first token of the window (FoT, LongLLaMA).
    NONE = "none"  # Nowhere: the query is not rotated towards memory.
    FIXED = "fixed"  # All at one distance: the query is rotated by `fixed_position`.


@dataclass(frozen=True, slots=True)
class SelfExtend:
    """Self-Extend of the window: near keys at their place, far keys in groups that share a position."""

    group: int  # G: far positions are divided by this.
    window: int  # w: keys nearer than this keep their place, tokens.
    logit_scaling: LogitScaling = LogitScaling.NONE
    scale_base: int | None = None  # Tokens; None: the model's trained length.

    def __post_init__(self) -> None:
        if self.group < 1 or self.window < 1:
            raise InvalidArgument(f"Self-Extend needs group ≥ 1 and window ≥ 1, got {self.group} and {self.window}")
        if self.scale_base is not None and self.scale_base < 2:
            raise InvalidArgument(f"scale_base must be ≥ 2 tokens, got {self.scale_base}")


@dataclass(frozen=True, slots=True)
class FotConfig:
    """Which layers have a memory and how the window before it works; lengths in tokens."""

    mem_layers: tuple[int, ...] = ()
    window: int = 2048  # C: the most tokens a layer sees locally; LongLLaMA's max_position_embeddings.
    last_context_length: int = 1024  # L: a longer prompt leaves this much in the window, the rest goes to memory.
    mem_positionals: bool = True  # False: memory layers rotate nothing, locally or towards memory.
    memory_position: MemoryPosition = MemoryPosition.FIRST
    fixed_position: int = 0  # With MemoryPosition.FIXED.
    mem_dtype: DType = DType.BF16
    overflow: Overflow = Overflow.SLIDE
    cut: Cut = Cut.ROW
    overlap: int = 0  # Tokens of left context every window of a long prompt recomputes and does not store.
    self_extend: SelfExtend | None = None
    block_tokens: int = 2048  # Windows that load together: more tokens, fewer calls, more RAM. Results do not change.

    def __post_init__(self) -> None:
        if self.window < 1 or not self.last_context_length >= 1:
            raise InvalidArgument(
                f"window and last_context_length must be ≥ 1 token, got {self.window} and {self.last_context_length}"
            )
        if list(self.mem_layers) != sorted(set(self.mem_layers)):
            raise InvalidArgument(f"mem_layers must be distinct and ascending, got {list(self.mem_layers)}")
        if not 0 <= self.overlap < self.window:
            raise InvalidArgument(f"overlap must be 0 to window - 1 = {self.window - 1}, got {self.overlap}")
        if self.block_tokens < 1:
            raise InvalidArgument(f"block_tokens must be ≥ 1, got {self.block_tokens}")


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One answer of the memory to one row, told to `Recall.on_read`."""

    layer: int
    row: int  # Of the batch.
    first_token: int  # Of the row's whole text: which token the first query belongs to.
    attended: Attended  # output [H, n, D], lse [H, n], and tokens, attribution, measured if asked for
    share: Tensor  # [H, n] how much of the joint softmax went to memory, 0 to 1


@dataclass(frozen=True, slots=True)
class Recall:
    """What a generation may remember and how the memory is asked; the same code path for every choice."""

    documents: ScopeLike = ALL_DOCUMENTS  # Document ids, a scope, or () for none; the row's own session is always seen.
    where: Where = None  # Metadata filter, as in "lang = py".
    top_k: int = 0  # 0: dense, softmax over everything in scope.
    engine: str = Engine.AUTO
    logit_gap: float | None = None  # With top_k: drop keys this far below the best.
    search: Mapping[str, float] = field(default_factory=dict)  # nprobe, candidates, …
    min_coverage: float = 1.0  # Below this share of the scope searched, the call fails rather than answer from less.
    output_dtype: DType = DType.F32  # On the wire.
    timeout_s: float | None = None
    tokens: bool = False  # Tell `on_read` the top tokens (needs top_k).
    attribution: bool = False  # Tell `on_read` the mass of every document.
    measure: bool = False  # Tell `on_read` recall and captured mass of an index.
    on_read: Callable[[Read], None] | None = None

    def __post_init__(self) -> None:
        self.options(1.0).check()
        self.scope()
        if not 0 <= self.min_coverage <= 1:
            raise InvalidArgument(f"min_coverage must be 0 to 1, got {self.min_coverage}")

    def options(self, scale: float) -> AttendOptions:
        """What the service is asked, at this scale of the scores."""
        return options_of(
            top_k=self.top_k,
            engine=self.engine,
            scale=scale,
            logit_gap=self.logit_gap,
            search=self.search,
            tokens=self.tokens,
            attribution=self.attribution,
            measure=self.measure,
            output_dtype=self.output_dtype,
        )

    def scope(self) -> Scope:
        """The documents every row sees."""
        return scope_of(self.documents, self.where)

    def quiet(self) -> Recall:
        """The same answers without the extras that only `on_read` looks at."""
        return replace(self, tokens=False, attribution=False, measure=False, on_read=None)
