"""A committed document, and where its tokens are now."""

from __future__ import annotations

from dataclasses import dataclass, replace

from memory_service.attention.slabs import Run, Slab
from memory_service.storage.records import DocumentRow
from memory_service.types.documents import DocumentInfo


@dataclass(frozen=True, slots=True, eq=False)
class LiveDocument:
    """A committed document; cold while `spans` is empty. Never changed, only replaced: readers keep what they saw."""

    row: DocumentRow
    spans: tuple[tuple[Slab, Run], ...] = ()  # Where its tokens stand in RAM, in token order.

    @property
    def info(self) -> DocumentInfo:
        row = self.row
        return DocumentInfo(row.id, row.tokens, row.metadata, row.generation, row.committed_at)

    def moved(self, part: int, segment: int, place: int) -> LiveDocument:
        """The document once one of its parts stands elsewhere on disk."""
        parts = tuple((segment, place) if number == part else old for number, old in enumerate(self.row.parts))
        return replace(self, row=replace(self.row, parts=parts))
