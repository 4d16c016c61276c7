"""Windows that a text holds more than once: licences, tables, boilerplate, the haystack of a passkey.

A window's keys and values depend on its tokens alone where no layer below them asks the memory, so those of a window
seen before are taken over. Exact, whatever stands between the two.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable


class Repeats:
    """Which windows are those of others: `origins[i]` is the window that window i takes over, or i itself."""

    def __init__(self, windows: Iterable[Hashable], reach: int):
        """`windows` are what makes each what it is; `reach` are remembered at most, those seen last."""
        self.origins: list[int] = []
        self._last: list[int] = []  # Of every window, the last one that takes it over.
        seen = OrderedDict[Hashable, int]()
        for number, window in enumerate(windows):
            origin = seen.setdefault(window, number)
            seen.move_to_end(window)
            if len(seen) > reach:
                seen.popitem(last=False)
            self.origins.append(origin)
            self._last.append(number)
            self._last[origin] = number

    @property
    def firsts(self) -> list[int]:
        """The windows that must be computed, in order."""
        return [number for number, origin in enumerate(self.origins) if number == origin]

    def last(self, origin: int) -> int:
        """The last window that takes this one over; itself if none does."""
        return self._last[origin]
