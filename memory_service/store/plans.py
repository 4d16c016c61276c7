"""What a scope means right now: worked out once, remembered until the next change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from memory_service.attention.slabs import Run, Slab
from memory_service.index.unit import IndexUnit
from memory_service.shards import Placement
from memory_service.store.live_document import LiveDocument

_PLANS = 16  # Scopes whose meaning is remembered.
_PLACEMENTS = 4  # Of the latest layouts: two hold while documents move.


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a scope means: rows in RAM, and documents to be read from disk."""

    parts: tuple[tuple[Slab, tuple[Run, ...]], ...]
    cold: tuple[LiveDocument, ...]
    documents: dict[int, LiveDocument]  # By catalogue key: all of the scope.
    tokens: int
    units: tuple[IndexUnit, ...]
    notes: dict[str, object] = field(default_factory=dict)  # What the engine derives once from this plan.


class Plans:
    """The plans made since the last change, the latest used kept. Not thread-safe."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()

    def find(self, key: tuple[object, ...], make: Callable[[], Plan]) -> Plan:
        """The plan of this key, made if there is none."""
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = make()
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def clear(self) -> None:
        """Something changed."""
        self._plans.clear()


class Owned:
    """Which documents of a memory a placement owns: hashing every id for every plan would take its time."""

    def __init__(self, memory: str):
        self._memory = memory
        self._owned: Mapping[Placement, dict[str, bool]] = {}

    def of(self, placement: Placement, documents: Iterable[str]) -> dict[str, bool]:
        """At least these documents, and whether the placement owns each."""
        names = list(documents)
        owned = self._owned.get(placement, {})
        if len(owned) > 2 * len(names) + 1000:
            owned = {}  # Mostly of documents that are gone.
        owned = owned | {name: placement.owns(self._memory, name) for name in names if name not in owned}
        # Replaced, not changed: readers of other scopes look at it.
        others = [(other, kept) for other, kept in self._owned.items() if other != placement]
        self._owned = {**dict(others[1 - _PLACEMENTS :]), placement: owned}
        return owned
