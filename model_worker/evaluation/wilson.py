"""How sure a share is: Wilson's score interval (Wilson 1927), which holds at few trials and near 0 and 100 %."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memory_service.errors import InvalidArgument

Z95 = 1.959963984540054  # Two-sided 95 % of the normal distribution.


@dataclass(frozen=True, slots=True)
class Share:
    """Successes among trials, with the interval its true value lies in at 95 %."""

    found: int
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.found <= self.trials:
            raise InvalidArgument(f"a share is 0 ≤ found ≤ trials, got {self.found} of {self.trials}")

    @property
    def value(self) -> float:
        """0 to 1; nan of no trial."""
        return self.found / self.trials if self.trials else math.nan

    @property
    def low(self) -> float:
        return wilson(self.found, self.trials)[0]

    @property
    def high(self) -> float:
        return wilson(self.found, self.trials)[1]

    def __add__(self, other: Share) -> Share:
        return Share(self.found + other.found, self.trials + other.trials)

    def __str__(self) -> str:
        """95.0 % (76.4–99.1)"""
        if not self.trials:
            return "no trial"
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f}–{100 * self.high:.1f})"


def wilson(found: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The interval's lower and upper end; 0 and 1 of no trial."""
    if not 0 <= found <= trials:
        raise InvalidArgument(f"an interval needs 0 ≤ found ≤ trials, got {found} of {trials}")
    if not trials:
        return 0.0, 1.0
    share, spread = found / trials, z * z / trials
    centre = share + spread / 2
    reach = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = (centre - reach) / (1 + spread), (centre + reach) / (1 + spread)
    # At the ends rounding would leave 1e-17 where 0 or 1 is meant.
    return (0.0 if found == 0 else max(0.0, low)), (1.0 if found == trials else min(1.0, high))
