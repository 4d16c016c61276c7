"""Positions for training inside a short window that reach over a long one: CREAM, and its baselines PoSE and RandPos.

N window, F factor: an example is up to N tokens of one text, at ascending positions out of 0 to F·N - 1. Every recipe
does two things apart: its draws ask a generator, and `place` is arithmetic from a draw to tokens and positions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_service.errors import InvalidArgument

Generator: TypeAlias = np.random.Generator


class Placement(NamedTuple):
    """Which tokens of a text an example has, and where they stand."""

    tokens: Tensor  # [n] int64, indices into the text
    positions: Tensor  # [n] int64, ascending


class Sampler(Protocol):
    """A recipe for examples."""

    @property
    def window(self) -> int:
        """N: an example has at most this many tokens."""

    def sample(self, lengths: Sequence[int], generator: Generator) -> list[Placement]:
        """One placement for each text, given their lengths in tokens; the same for the same state of `generator`."""


# --- CREAM ------------------------------------------------------------------------------------------------------------


class Branch(StrEnum):
    """How long the head and the tail of a CREAM example are."""

    RELATIVITY = "relativity"  # N // 3 each: all distances between the three segments occur.
    CONTINUITY = "continuity"  # 4·F each: nearly the whole example is one stretch, as in ordinary text.


class BranchDraw(StrEnum):
    """How often CREAM draws the branch."""

    EXAMPLE = "example"  # For every example, so that every batch mixes both.
    CALL = "call"  # Once for all texts of a `sample`, as the authors do for every 3,000.


class Middle(StrEnum):
    """Where CREAM puts the middle segment."""

    # The authors' draw. Its Gaussian is neither truncated nor centred on the target: with thirds the middle ends around
    # a third of the way, whatever F is.
    PUBLISHED = "published"
    # The middle's centre is Gaussian around the centre of the target, truncated to where the middle fits.
    CENTRED = "centred"


class Tokens(StrEnum):
    """How CREAM treats texts that have too few tokens for their positions."""

    STRICT = "strict"  # A text shorter than the window is refused; no token is taken twice.
    # As the authors' code: indices before the text's start count from its end, and a middle may overlap the tail.
    PUBLISHED = "published"


class Segments(NamedTuple):
    """Lengths in tokens; they add up to N."""

    head: int
    middle: int
    tail: int


class CreamDraw(NamedTuple):
    """All that is random in one CREAM example."""

    branch: Branch
    uniform: float  # 0 to 1: says how far out the middle stands.
    end: int  # Position of the middle's last token.


@dataclass(frozen=True, slots=True)
class Cream:
    """Head, middle and tail of a text at the start, somewhere inside, and at the end of F·N positions (CREAM, §3).

    The defaults sample the authors' positions but for two repairs: the branch is drawn for every example, and no token
    is taken twice (their code does so in 1.3 % of the RELATIVITY examples of texts of just N tokens, at F = 8).
    `branches` of one element trains that branch alone. Raises InvalidArgument if head and tail do not fit into N.
    """

    window: int
    factor: int
    sigma: float = 3.0  # In half windows, N/2 positions. CENTRED: let it grow with F, or the middle hardly moves.
    middle: Middle = Middle.PUBLISHED
    branch_draw: BranchDraw = BranchDraw.EXAMPLE
    tokens: Tokens = Tokens.STRICT
    branches: tuple[Branch, ...] = (Branch.RELATIVITY, Branch.CONTINUITY)

    def __post_init__(self) -> None:
        _check_target(self.window, self.factor)
        if not 0 < self.sigma < float("inf"):
            raise InvalidArgument(f"sigma must be a positive number of half windows, got {self.sigma}")
        if not self.branches:
            raise InvalidArgument("CREAM needs at least one branch")
        for branch in self.branches:
            segments = self.segments(branch)
            if segments.head < 1 or segments.middle < 0:
                raise InvalidArgument(
                    f"head and tail of {segments.head} tokens each do not fit a window of {self.window} ({branch}): "
                    f"use a window of {max(3, 8 * self.factor)} tokens or more, a smaller factor, or only the other "
                    "branch (branches=...)"
                )

    def segments(self, branch: Branch) -> Segments:
        """Lengths of head, middle and tail."""
        ends = self.window // 3 if branch is Branch.RELATIVITY else 4 * self.factor
        return Segments(ends, self.window - 2 * ends, ends)

    def end_range(self, branch: Branch, uniform: float) -> tuple[int, int]:
        """First and last position where the middle may end, given how far out `uniform` puts it."""
        head, middle, tail = self.segments(branch)
        if self.middle is Middle.CENTRED:
            end = self._centred_end(branch, uniform)
            return end, end
        # In half windows, so whole numbers: an odd window times an odd number of halves is rounded down, where the
        # authors' code stops.
        halves = doubled_factor(uniform, self.factor, self.sigma)
        return head + (middle - 1) * halves // 2, halves * self.window // 2 - tail - 1

    def draw(self, generator: Generator, branch: Branch | None = None) -> CreamDraw:
        """Draw one example, of this branch if given."""
        branch = branch or self.draw_branch(generator)
        uniform = float(generator.random())
        first, last = self.end_range(branch, uniform)
        return CreamDraw(branch, uniform, int(generator.integers(first, last, endpoint=True)))

    def draw_branch(self, generator: Generator) -> Branch:
        """One of the branches, all equally likely."""
        return self.branches[int(generator.integers(len(self.branches)))]

    def place(self, length: int, draw: CreamDraw) -> Placement:
        """The tokens and positions of this draw in a text of `length` tokens. Raises InvalidArgument if it is short."""
        head, middle, tail = self.segments(draw.branch)
        reach, start = self.factor * self.window, draw.end - middle + 1
        if middle and not head <= start <= reach - tail - middle:
            raise InvalidArgument(f"a middle of {middle} tokens cannot end at position {draw.end} of {reach}")
        positions = torch.cat(
            (torch.arange(head), torch.arange(start, start + middle), torch.arange(reach - tail, reach))
        )
        strict = self.tokens is Tokens.STRICT
        if strict and length < self.window:
            raise InvalidArgument(
                f"a text of {length} tokens is too short for CREAM with a window of {self.window}: leave it out, join "
                "short texts, or use PoSE or RandPos, which make a shorter example of it"
            )
        # The middle's own tokens if the text has them, else those just before the tail.
        here = draw.end < (length - tail if strict else length)
        first = start if here else length - tail - middle
        tokens = torch.cat(
            (torch.arange(head), torch.arange(first, first + middle), torch.arange(length - tail, length))
        )
        if not strict:
            tokens = tokens.where(tokens >= 0, tokens + length)
            if tokens.min() < 0 or tokens.max() >= length:
                raise InvalidArgument(f"a text of {length} tokens is too short for a window of {self.window}")
        return Placement(tokens, positions)

    def sample(self, lengths: Sequence[int], generator: Generator) -> list[Placement]:
        """One placement for each text."""
        branch = self.draw_branch(generator) if self.branch_draw is BranchDraw.CALL else None
        return [self.place(length, self.draw(generator, branch)) for length in lengths]

    def _centred_end(self, branch: Branch, uniform: float) -> int:
        head, middle, tail = self.segments(branch)
        reach = self.factor * self.window
        first, last = head + middle - 1, reach - tail - 1
        normal = NormalDist((reach + middle) / 2 - 1, self.sigma * self.window / 2)
        low, high = normal.cdf(first - 0.5), normal.cdf(last + 0.5)
        # The quantile of 0 and 1 is infinite; anything next to it ends at the border just as well.
        share = min(max(low + uniform * (high - low), 1e-300), 1 - 2**-53)
        return min(max(round(normal.inv_cdf(share)), first), last)


def doubled_factor(uniform: float, factor: int, sigma: float) -> int:
    """The authors' Gaussian choice of 2 to 2·F halves of a window: whole, cut off at the ends, not renormalised."""
    shares, halves = _quantiles(factor, sigma)
    return int(np.interp(uniform, shares, halves))


@lru_cache(maxsize=16)
def _quantiles(factor: int, sigma: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    normal = NormalDist(1 + factor, sigma)
    halves = np.linspace(2, 2 * factor, 1000)
    return np.array([normal.cdf(half) for half in halves]), halves


# --- baselines --------------------------------------------------------------------------------------------------------


class PoseDraw(NamedTuple):
    """All that is random in one PoSE example."""

    first: int  # Tokens of the first chunk.
    end: int  # Where in the text the second chunk ends.
    skip: int  # Positions left out between them.


@dataclass(frozen=True, slots=True)
class Pose:
    """The first tokens of a text and a chunk from further on, with a gap of positions between them (PoSE, §3).

    A text shorter than the window gives a shorter example.
    """

    window: int
    factor: int
    longest: int | None = None  # Of a text, only so many tokens are used. None: F·N, as CREAM's copy; PoSE's own: 5·N.

    def __post_init__(self) -> None:
        _check_target(self.window, self.factor)
        if self.longest is not None:
            _check_whole("longest", self.longest)

    def ranges(self, length: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """First and last value of the three draws, for a text of `length` tokens."""
        reach = self.factor * self.window
        used = min(length, reach if self.longest is None else self.longest)
        count = min(used, self.window)
        _check_whole("the length of a text", count)
        return (1, (count + 1) // 2), (count, used), (0, reach - count)

    def draw(self, length: int, generator: Generator) -> PoseDraw:
        """Draw one example of a text of `length` tokens."""
        first, end, skip = (int(generator.integers(*ends, endpoint=True)) for ends in self.ranges(length))
        return PoseDraw(first, end, skip)

    def place(self, length: int, draw: PoseDraw) -> Placement:
        """The tokens and positions of this draw."""
        ranges = self.ranges(length)
        if not all(least <= value <= most for value, (least, most) in zip(draw, ranges, strict=True)):
            raise InvalidArgument(f"{draw} is no draw for a text of {length} tokens")
        count, _ = ranges[1]
        tokens = torch.cat((torch.arange(draw.first), torch.arange(draw.end - (count - draw.first), draw.end)))
        positions = torch.arange(count)
        positions[draw.first :] += draw.skip
        return Placement(tokens, positions)

    def sample(self, lengths: Sequence[int], generator: Generator) -> list[Placement]:
        """One placement for each text."""
        return [self.place(length, self.draw(length, generator)) for length in lengths]


@dataclass(frozen=True, slots=True)
class RandomPositions:
    """The first N tokens of a text at positions drawn without replacement and sorted (RandPos).

    With factor 1 that is ordinary training on the first N tokens. A shorter text gives a shorter example.
    """

    window: int
    factor: int

    def __post_init__(self) -> None:
        _check_target(self.window, self.factor)

    def draw(self, length: int, generator: Generator) -> list[int]:
        """Draw the positions for a text of `length` tokens, in any order."""
        count = min(length, self.window)
        drawn = generator.choice(self.factor * self.window, count, replace=False, shuffle=False)
        return [int(position) for position in drawn]

    def place(self, length: int, draw: Sequence[int]) -> Placement:
        """The tokens and positions of this draw."""
        count = min(length, self.window)
        _check_whole("the length of a text", count)
        if len(draw) != count:
            raise InvalidArgument(f"{len(draw)} positions were drawn for {count} tokens")
        return Placement(torch.arange(count), torch.tensor(sorted(draw), dtype=torch.int64))

    def sample(self, lengths: Sequence[int], generator: Generator) -> list[Placement]:
        """One placement for each text."""
        return [self.place(length, self.draw(length, generator)) for length in lengths]


def _check_target(window: int, factor: int) -> None:
    _check_whole("window", window)
    _check_whole("factor", factor)


def _check_whole(name: str, value: int) -> None:
    try:
        whole = operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{name} must be a whole number, got {value!r}") from None
    if whole < 1:
        raise InvalidArgument(f"{name} must be at least 1, got {value}")
