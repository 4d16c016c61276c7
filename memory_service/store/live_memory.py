"""One memory while the store is open: its documents, where their tokens are, and what a scope means right now.

Writers take turns; readers take a lock only to read a plan, never while they compute. A plan stays valid while it is
held: slabs keep their rows and files stay on disk until the last reader that knows them is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from memory_service.attention.residency import Residency
from memory_service.attention.slabs import Run, Slab, join, read_spans, slab_rows
from memory_service.errors import Cancelled, NotFound, ResourceExhausted, Superseded
from memory_service.index.unit import IndexUnit
from memory_service.shards import Placement
from memory_service.storage.parts import SegmentRef
from memory_service.storage.records import DocumentRow, MemoryRow
from memory_service.storage.segments import SegmentFiles
from memory_service.store.cold_tokens import ColdTokens
from memory_service.store.holds import Hold
from memory_service.store.live_document import LiveDocument
from memory_service.store.plans import Owned, Plan, Plans
from memory_service.store.readers import Readers
from memory_service.store.warm_tokens import Spans, WarmTokens, append_span, bury
from memory_service.types.callers import Cancel
from memory_service.types.conditions import Filter
from memory_service.types.memories import MemoryInfo
from memory_service.types.specs import MemorySpec

_PATIENCE_S = 1.0  # Of a writer that is held; such a moment lasts milliseconds unless somebody died.
_RETRY_S = 0.2


class LiveMemory:
    """See the module. `files` is None where nothing is durable: then documents live in slabs only."""

    def __init__(self, row: MemoryRow, files: SegmentFiles | None, residency: Residency, device: torch.device):
        self.row = row
        self.files = files
        self.documents: dict[str, LiveDocument] = {}
        self.graves: dict[str, int] = {}  # Of deleted documents: the last generation that is dead.
        self._owned = Owned(row.name)
        self.units: tuple[IndexUnit, ...] = ()
        self.tokens = 0
        self.nbytes = 0
        self.last_used = 0.0
        self.deleted = False
        self.writing = threading.RLock()  # Held by whoever changes documents or segments.
        self.filling = threading.Lock()  # Held by whoever writes slabs; taken after `writing`.
        self._residency = residency
        self._charged = 0  # Of the residency budget.
        self._state = threading.Lock()  # Held for moments only.
        self._readers = Readers(self._state)
        self._plans = Plans()
        self._holds: tuple[Hold, ...] = ()
        self._cold = ColdTokens(row, files)
        rows = slab_rows(row.spec, max(residency.budget // 8, 1 << 20) if files else 1 << 40)
        self._warm = WarmTokens(row.spec, rows, device, self._state)
        residency.join(self)

    @property
    def version(self) -> int:
        """Grows with every change of what a scope could mean."""
        return self._readers.version

    @property
    def spec(self) -> MemorySpec:
        return self.row.spec

    @property
    def info(self) -> MemoryInfo:
        return MemoryInfo(self.row.name, self.spec, self.row.created_at, len(self.documents), self.tokens, self.nbytes)

    @property
    def segments(self) -> dict[int, SegmentRef]:
        """The segments on disk, by catalogue key."""
        return self._cold.segments

    @property
    def slabs(self) -> list[Slab]:
        """What holds tokens in RAM."""
        return self._warm.slabs

    @property
    def resident_bytes(self) -> int:
        return self._warm.nbytes

    @property
    def dead_bytes(self) -> int:
        """Bytes in segments that belong to no live document."""
        segments = self.segments.copy().values()  # A commit may add to them at any time.
        return max(0, sum(part.nbytes for ref in segments for part in ref.parts) - self.nbytes)

    def stored_bytes(self, tokens: int) -> int:
        """Bytes a document of so many tokens takes: keys, values and token ids."""
        return tokens * (self.spec.bytes_per_token + 4)

    def document(self, name: str) -> LiveDocument:
        """A committed document; NotFound if there is none."""
        try:
            return self.documents[name]
        except KeyError:
            raise NotFound(f"memory {self.row.name!r} has no document {name!r}") from None

    def check_newest(self, document: str, generation: int, or_equal: bool = False) -> None:
        """Raise Superseded if a state of the document is known that `generation` (0: none was given) cannot follow."""
        if not generation:
            return
        known = self.documents.get(document)
        alive = known.row.generation if known else 0
        dead = self.graves.get(document, 0)
        newest = alive if or_equal else max(alive, dead)
        if generation < newest or (generation == newest and not or_equal):
            raise Superseded(
                f"document {document!r} has a newer state than the one written; write again if it should replace that",
                generation=str(newest),
            )

    def held(self, placement: Placement | None) -> MemoryInfo:
        """What is here, of what the placement owns."""
        if placement is None:
            return self.info
        rows = [one.row for one in self._chosen(placement)]
        tokens = sum(row.tokens for row in rows)
        nbytes = sum(self.stored_bytes(row.tokens) for row in rows)
        return replace(self.info, documents=len(rows), tokens=tokens, bytes=nbytes)

    # --- Readers ----------------------------------------------------------------------------------------------------

    def reading(self) -> AbstractContextManager[None]:
        """Keep everything a plan made inside may refer to."""
        return self._readers.reading()

    def plan(self, documents: tuple[str, ...] | None, where: Filter | None, placement: Placement | None = None) -> Plan:
        """What the scope means now. NotFound if a document named in it does not exist.

        Of documents the scope does not name, `placement` leaves those it owns.
        """
        with self._state:
            return self._plans.find((documents, where, placement), lambda: self._make_plan(documents, where, placement))

    def _chosen(self, placement: Placement | None) -> list[LiveDocument]:
        documents = self.documents.copy()
        if placement is None:
            return list(documents.values())
        owned = self._owned.of(placement, documents)
        return [document for name, document in documents.items() if owned[name]]

    def _make_plan(self, names: tuple[str, ...] | None, where: Filter | None, placement: Placement | None) -> Plan:
        if names is None:
            chosen = self._chosen(placement)
        else:
            chosen = [self.document(name) for name in dict.fromkeys(names)]
        if where is not None:
            chosen = [document for document in chosen if where.matches(document.row.metadata)]
        if len(chosen) == len(self.documents):
            parts = [(slab, tuple(slab.runs)) for slab in self.slabs if slab.runs]
        else:
            runs: dict[Slab, list[Run]] = {}
            for document in chosen:
                for slab, run in document.spans:
                    runs.setdefault(slab, []).append(run)
            parts = [(slab, join(runs[slab])) for slab in self.slabs if slab in runs]
        cold = tuple(document for document in chosen if not document.spans)
        tokens = sum(document.row.tokens for document in chosen)
        return Plan(tuple(parts), cold, {document.row.pk: document for document in chosen}, tokens, self.units)

    def read_cold(
        self, document: LiveDocument, layer: int, first: int, count: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Keys and values [H, T, D] of a document's tokens from disk, in pieces: (first token, keys, values)."""
        return self._cold.read(document, layer, first, count)

    def read(self, document: LiveDocument, layer: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [H, T, D] and ids [T] of a document's tokens, from RAM if they are there."""
        if document.spans:
            return read_spans(document.spans, layer, first, count)
        pieces = list(self.read_cold(document, layer, first, count))
        keys = torch.cat([keys for _, keys, _ in pieces], dim=1)
        values = torch.cat([values for *_, values in pieces], dim=1)
        return keys, values, self._cold.read_ids(document, first, count)

    # --- Who waits for whom -----------------------------------------------------------------------------------------

    @property
    def writers_wait(self) -> bool:
        """Whether the documents must stay as they are. Under `writing` no becomes yes only by `hold_writers`."""
        return any(one.holds for one in self._holds)

    def hold_writers(self, hold: Hold) -> None:
        """Keep writers waiting until the hold ends. Hold `writing`."""
        self._holds = (*(one for one in self._holds if one.holds), hold)

    def wait_for_holds(self) -> None:
        """Wait while writers are held. ResourceExhausted if that takes long: other memories need the thread."""
        for one in self._holds:
            if not one.wait(_PATIENCE_S):
                raise ResourceExhausted(
                    f"a snapshot keeps the writers of memory {self.row.name!r} waiting; try again in a moment",
                    reason="HELD",
                    retry_after_s=_RETRY_S,
                )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Take `writing` where no writer is held. Raises as `wait_for_holds`."""
        while True:
            self.wait_for_holds()
            with self.writing:
                if not self.writers_wait:
                    yield
                    return

    # --- Writers: hold `writing`, or `filling` where it says so -------------------------------------------------------

    def publish(self, rows: Sequence[DocumentRow], segments: Sequence[tuple[int, SegmentRef]] = ()) -> None:
        """Make committed documents visible, replacing what had their names."""
        with self._state:
            for pk, ref in segments:
                self.segments[pk] = ref
            for row in rows:
                self._forget(row.id)
                self.documents[row.id] = LiveDocument(row)
                self.tokens += row.tokens
                self.nbytes += self.stored_bytes(row.tokens)
            self._changed()

    def publish_resident(self, row: DocumentRow, keys: Tensor, values: Tensor, ids: Tensor | None) -> None:
        """Make a document visible that lives in RAM only."""
        with self.filling:
            spans = self._warm.write(keys, values, ids)
        with self._state:
            self._forget(row.id)
            self._admit(LiveDocument(row, tuple(spans)))
            self.tokens += row.tokens
            self.nbytes += self.stored_bytes(row.tokens)
            self._changed()

    def forget(self, name: str) -> None:
        """Make a document invisible; what holds its bytes is reclaimed later."""
        with self._state:
            self._forget(name)
            self._changed()

    def promote(self, document: LiveDocument, cancel: Cancel) -> bool:
        """Bring a cold document into RAM if the budget allows; hold `filling`, and be `reading`.

        Raises DataLoss if its bytes are damaged, Cancelled if the memory is deleted meanwhile.
        """
        size = document.row.tokens * self.spec.bytes_per_token
        if self.deleted or document.spans or not document.row.tokens or not self._residency.take(size, self):
            return False
        self._charged += size
        try:
            spans = self._copy_in(document, cancel)
            with self._state:
                known = self.documents.get(document.row.id)
                if known is not None and known.row.pk == document.row.pk:
                    self._admit(replace(known, spans=tuple(spans)))
                    self._changed()
                    return True
                bury(spans)
            return False
        finally:
            self._settle()

    def send_away(self) -> bool:
        """Take the oldest slab out of RAM; its documents become cold. False if there is none to take."""
        if not self.filling.acquire(blocking=False):
            return False  # Busy with its own slabs, so not idle after all.
        try:
            with self._state:
                if self.files is None or not self.slabs:
                    return False
                slab = self.slabs.pop(0)
                for document in [d for d in self.documents.values() if any(known is slab for known, _ in d.spans)]:
                    for other, run in document.spans:
                        if other is not slab:
                            other.drop(run)
                    self.documents[document.row.id] = replace(document, spans=())
                self._changed()
            self._settle()
            return True
        finally:
            self.filling.release()

    def tidy(self) -> None:
        """Write slabs anew of which more than half is dead; hold `filling`."""
        for slab in [one for one in self.slabs if one.dead * 2 > max(one.used) > 0]:
            with self._state:
                if slab is self.slabs[-1]:  # New rows must go elsewhere.
                    self._warm.begin_slab()
                affected = [d for d in self.documents.values() if any(known is slab for known, _ in d.spans)]
            moved = [
                (document, {run: self._warm.move(slab, run) for known, run in document.spans if known is slab})
                for document in affected
            ]
            with self._state:  # At once: a query in between would miss tokens.
                self.slabs.remove(slab)
                for document, fresh in moved:
                    self._replace_spans(document, slab, fresh)
                self._changed()
            self._settle()

    def replace_segments(
        self, added: Sequence[tuple[int, SegmentRef]], dropped: Sequence[int], release: Callable[[], None]
    ) -> None:
        """After compaction: documents now live in other segments. `release` runs once no reader knows the old ones."""
        with self._state:
            for pk, ref in added:
                self.segments[pk] = ref
                for place, part in enumerate(ref.parts):
                    document = self.documents.get(part.header.document)
                    if document and document.row.generation == part.header.generation:
                        self.documents[document.row.id] = document.moved(part.header.part, pk, place)
            self._cold.retire(dropped)
            self._changed()
            self._readers.retire(lambda: self._drop_segments(dropped, release))
        self._readers.release()

    def set_units(self, units: tuple[IndexUnit, ...]) -> None:
        """Answer from these indexes from now on."""
        with self._state:
            self.units = units
            self._changed()

    def close(self, release: Callable[[], None] = lambda: None) -> None:
        """Give the budget back; `release` runs once no reader is left."""
        with self._state:
            self.deleted = True
            self._changed()
            self._readers.retire(release)
        self._residency.leave(self)
        self._residency.give(self._charged)
        self._charged = 0
        self._readers.release()

    def _drop_segments(self, dropped: Sequence[int], release: Callable[[], None]) -> None:
        self._cold.drop(dropped)
        release()

    def _copy_in(self, document: LiveDocument, cancel: Cancel) -> Spans:
        spans: Spans = []
        try:
            for keys, values, ids in self._cold.read_whole(document):
                cancel.check()
                if self.deleted:
                    raise Cancelled("the memory was deleted")
                for slab, run in self._warm.write(keys, values, ids):
                    append_span(spans, slab, run)
        except BaseException:
            bury(spans)
            raise
        return spans

    def _admit(self, document: LiveDocument) -> None:
        offset = 0
        for slab, run in document.spans:
            slab.admit(document.row.id, offset, run)
            offset += run[1] - run[0]
        self.documents[document.row.id] = document

    def _replace_spans(self, document: LiveDocument, slab: Slab, fresh: dict[Run, Spans]) -> None:
        known = self.documents.get(document.row.id)
        if known is None or known.row.pk != document.row.pk:
            for written in fresh.values():
                bury(written)
            return
        spans: Spans = []
        offset = 0
        for old, run in known.spans:
            for target, new in fresh[run] if old is slab else [(old, run)]:
                if old is slab:
                    target.admit(known.row.id, offset, new)
                spans.append((target, new))
                offset += new[1] - new[0]
        self.documents[known.row.id] = replace(known, spans=tuple(spans))

    def _forget(self, name: str) -> None:
        document = self.documents.pop(name, None)
        if document is None:
            return
        for slab, run in document.spans:
            slab.drop(run)
        self.tokens -= document.row.tokens
        self.nbytes -= self.stored_bytes(document.row.tokens)

    def _settle(self) -> None:
        """Make what the budget was charged equal to what is in RAM."""
        if self.files is not None and not self.deleted:  # `close` gave back what a deleted memory held.
            actual = self.resident_bytes
            self._residency.give(self._charged - actual)
            self._charged = actual

    def _changed(self) -> None:
        self._readers.changed()
        self._plans.clear()
