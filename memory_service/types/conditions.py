"""Conditions on metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

Scalar = str | int | float | bool


class Compare(StrEnum):
    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    IN = "in"
    EXISTS = "exists"


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison with a metadata field. A missing field matches only NE."""

    key: str
    compare: Compare
    values: tuple[Scalar, ...] = ()

    def matches(self, metadata: Mapping[str, Scalar]) -> bool:
        if self.compare is Compare.EXISTS:
            return self.key in metadata
        if self.key not in metadata:
            return self.compare is Compare.NE
        have = metadata[self.key]
        if self.compare is Compare.IN:
            return any(_same(have, value) for value in self.values)
        want = self.values[0]
        if self.compare in (Compare.EQ, Compare.NE):
            return _same(have, want) == (self.compare is Compare.EQ)
        if isinstance(have, str) != isinstance(want, str) or isinstance(have, bool) or isinstance(want, bool):
            return False
        below, equal = have < want, have == want  # type: ignore[operator]  # both str or both numbers, checked above
        return {
            Compare.LT: below,
            Compare.LE: below or equal,
            Compare.GT: not below and not equal,
            Compare.GE: not below,
        }[self.compare]


def _same(a: Scalar, b: Scalar) -> bool:
    # In Python True == 1; in metadata a flag is not a number.
    return isinstance(a, bool) == isinstance(b, bool) and a == b


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every part matches; an empty one matches everything."""

    parts: tuple[Filter, ...]

    def matches(self, metadata: Mapping[str, Scalar]) -> bool:
        return all(part.matches(metadata) for part in self.parts)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one part matches."""

    parts: tuple[Filter, ...]

    def matches(self, metadata: Mapping[str, Scalar]) -> bool:
        return any(part.matches(metadata) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not match."""

    part: Filter

    def matches(self, metadata: Mapping[str, Scalar]) -> bool:
        return not self.part.matches(metadata)


Filter = Condition | AllOf | AnyOf | Not
