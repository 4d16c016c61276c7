"""One memory while the store is open: its documents, where their tokens are, and what a scope means right now.

Writers take turns; readers take a lock only to read a plan, never while they compute. A plan stays valid while it is
held: slabs keep their rows and files stay on disk until the last reader that knows them is done.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memory_service.attention.residency import Residency
from memory_service.attention.slabs import Run, Slab, join, read_spans, slab_rows
from memory_service.errors import Cancelled, NotFound, Superseded
from memory_service.index.unit import IndexUnit
from memory_service.shards import Placement
from memory_service.storage.parts import SegmentRef
from memory_service.storage.records import DocumentRow, MemoryRow
from memory_service.storage.segments import SegmentFiles
from memory_service.types.callers import Cancel
from memory_service.types.conditions import Filter
from memory_service.types.documents import DocumentInfo
from memory_service.types.memories import MemoryInfo
from memory_service.types.specs import MemorySpec

_PIECE_BYTES = 16 << 20  # Read from disk at a time.
_PLANS = 16  # Scopes whose meaning is remembered until the next change.


@dataclass(frozen=True, slots=True, eq=False)
class LiveDocument:
    """A committed document; cold while `spans` is empty. Never changed, only replaced: readers keep what they saw."""

    row: DocumentRow
    spans: tuple[tuple[Slab, Run], ...] = ()  # Where its tokens stand in RAM, in token order.

    @property
    def info(self) -> DocumentInfo:
        row = self.row
        return DocumentInfo(row.id, row.tokens, row.metadata, row.generation, row.committed_at)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a scope means: rows in RAM, and documents to be read from disk."""

    parts: tuple[tuple[Slab, tuple[Run, ...]], ...]
    cold: tuple[LiveDocument, ...]
    documents: dict[int, LiveDocument]  # By catalogue key: all of the scope.
    tokens: int
    units: tuple[IndexUnit, ...]
    notes: dict[str, object] = field(default_factory=dict)  # What the engine derives once from this plan.


class LiveMemory:
    """See the module. `files` is None where nothing is durable: then documents live in slabs only."""

    def __init__(self, row: MemoryRow, files: SegmentFiles | None, residency: Residency, device: torch.device):
        self.row = row
        self.files = files
        self.documents: dict[str, LiveDocument] = {}
        self.graves: dict[str, int] = {}  # Of deleted documents: the last generation that is dead.
        self._owned: dict[Placement, dict[str, bool]] = {}  # Hashing every id for every plan would take its time.
        self.segments: dict[int, SegmentRef] = {}
        self._retiring: dict[int, SegmentRef] = {}  # Compacted, but known to a reader.
        self.slabs: list[Slab] = []
        self.units: tuple[IndexUnit, ...] = ()
        self.tokens = 0
        self.nbytes = 0
        self.last_used = 0.0
        self.deleted = False
        self.writing = threading.RLock()  # Held by whoever changes documents or segments.
        self.filling = threading.Lock()  # Held by whoever writes slabs; taken after `writing`.
        self._residency = residency
        self._device = device
        self._charged = 0  # Of the residency budget.
        self._state = threading.Lock()  # Held for moments only.
        self._version = 0
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        self._readers: dict[int, int] = {}
        self._retired: list[tuple[int, Callable[[], None]]] = []
        self._slab_rows = slab_rows(row.spec, max(residency.budget // 8, 1 << 20) if files else 1 << 40)
        residency.join(self)

    @property
    def version(self) -> int:
        """Grows with every change of what a scope could mean."""
        return self._version

    @property
    def spec(self) -> MemorySpec:
        return self.row.spec

    @property
    def info(self) -> MemoryInfo:
        return MemoryInfo(self.row.name, self.spec, self.row.created_at, len(self.documents), self.tokens, self.nbytes)

    @property
    def resident_bytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)

    @property
    def dead_bytes(self) -> int:
        """Bytes in segments that belong to no live document."""
        return max(0, sum(part.nbytes for ref in self.segments.values() for part in ref.parts) - self.nbytes)

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

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep everything a plan made inside may refer to."""
        with self._state:
            version = self._version
            self._readers[version] = self._readers.get(version, 0) + 1
        try:
            yield
        finally:
            with self._state:
                self._readers[version] -= 1
                if not self._readers[version]:
                    del self._readers[version]
            self._release()

    def plan(self, documents: tuple[str, ...] | None, where: Filter | None, placement: Placement | None = None) -> Plan:
        """What the scope means now. NotFound if a document named in it does not exist.

        Of documents the scope does not name, `placement` leaves those it owns.
        """
        key = (documents, where, placement)
        with self._state:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
                return plan
            plan = self._make_plan(documents, where, placement)
            self._plans[key] = plan
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
            return plan

    def _chosen(self, placement: Placement | None) -> list[LiveDocument]:
        documents = self.documents.copy()
        if placement is None:
            return list(documents.values())
        owned = self._owned.get(placement, {})
        if len(owned) > 2 * len(documents) + 1000:
            owned = {}  # Mostly of documents that are gone.
        fresh = {name: placement.owns(self.row.name, name) for name in documents if name not in owned}
        # Replaced, not changed: readers of other scopes look at it. Two layouts hold while documents move.
        known = {other: kept for other, kept in self._owned.items() if other != placement}
        owned = owned | fresh
        self._owned = {**dict(list(known.items())[-3:]), placement: owned}
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
        assert self.files is not None, "what is not durable is in RAM"
        per_token = self.spec.bytes_per_token // len(self.spec.layers)
        step = max(1, _PIECE_BYTES // per_token)
        for segment, part in document.row.parts:
            ref = self._segment(segment)
            header = ref.parts[part].header
            start, stop = max(first, header.first_token), min(first + count, header.first_token + header.tokens)
            for at in range(start, stop, step):
                size = min(step, stop - at)
                place = (self.row.key, ref, part)
                keys = self.files.read_tensor(*place, "keys", layer, at - header.first_token, size)
                values = self.files.read_tensor(*place, "values", layer, at - header.first_token, size)
                yield at, keys, values

    def _segment(self, pk: int) -> SegmentRef:
        return self.segments.get(pk) or self._retiring[pk]

    def read(self, document: LiveDocument, layer: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [H, T, D] and ids [T] of a document's tokens, from RAM if they are there."""
        if document.spans:
            return read_spans(document.spans, layer, first, count)
        pieces = list(self.read_cold(document, layer, first, count))
        keys = torch.cat([keys for _, keys, _ in pieces], dim=1)
        values = torch.cat([values for *_, values in pieces], dim=1)
        return keys, values, self._read_cold_ids(document, first, count)

    def _read_cold_ids(self, document: LiveDocument, first: int, count: int) -> Tensor:
        assert self.files is not None, "what is not durable is in RAM"
        found: list[Tensor] = []
        for segment, part in document.row.parts:
            ref = self._segment(segment)
            header = ref.parts[part].header
            start, stop = max(first, header.first_token), min(first + count, header.first_token + header.tokens)
            if start < stop:
                at = start - header.first_token
                found.append(self.files.read_ids(self.row.key, ref, part, at, stop - start))
        return torch.cat(found)

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
            spans = self._write(keys, values, ids)
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
                for slab, run in spans:
                    slab.dead += run[1] - run[0]
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
                    self.slabs.append(Slab(self.spec, self._slab_rows, self._device))
                affected = [d for d in self.documents.values() if any(known is slab for known, _ in d.spans)]
            moved = [
                (document, {run: self._move(slab, run) for known, run in document.spans if known is slab})
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
                        row = _moved(document.row, part.header.part, (pk, place))
                        self.documents[row.id] = replace(document, row=row)
            for pk in dropped:
                self._retiring[pk] = self.segments[pk]  # Readers take no lock: it is always in one of the two.
                del self.segments[pk]
            self._changed()
            self._retire(lambda: self._drop_segments(dropped, release))
        self._release()

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
            self._retire(release)
        self._residency.leave(self)
        self._residency.give(self._charged)
        self._charged = 0
        self._release()

    def _drop_segments(self, dropped: Sequence[int], release: Callable[[], None]) -> None:
        for pk in dropped:
            del self._retiring[pk]
        release()

    def _write(self, keys: Tensor, values: Tensor, ids: Tensor | None) -> list[tuple[Slab, Run]]:
        """Copy tokens [L, H, T, D] into slabs, not yet live."""
        spans: list[tuple[Slab, Run]] = []
        done, tokens = 0, keys.shape[2]
        layers = range(len(self.spec.layers))
        while done < tokens:
            if not self.slabs or not self.slabs[-1].room:
                with self._state:
                    self.slabs.append(Slab(self.spec, self._slab_rows, self._device))
            slab = self.slabs[-1]
            size = min(tokens - done, slab.room)
            first = max(slab.used)
            piece = slice(done, done + size)
            slab.write(layers, first, keys[:, :, piece], values[:, :, piece], None if ids is None else ids[piece])
            if spans and spans[-1][0] is slab and spans[-1][1][1] == first:
                spans[-1] = (slab, (spans[-1][1][0], first + size))
            else:
                spans.append((slab, (first, first + size)))
            done += size
        return spans

    def _copy_in(self, document: LiveDocument, cancel: Cancel) -> list[tuple[Slab, Run]]:
        spans: list[tuple[Slab, Run]] = []
        step = max(1, _PIECE_BYTES // self.spec.bytes_per_token)
        try:
            for first in range(0, document.row.tokens, step):
                cancel.check()
                if self.deleted:
                    raise Cancelled("the memory was deleted")
                count = min(step, document.row.tokens - first)
                pieces = [list(self.read_cold(document, layer, first, count)) for layer in range(len(self.spec.layers))]
                keys = torch.stack([torch.cat([keys for _, keys, _ in layer], dim=1) for layer in pieces])
                values = torch.stack([torch.cat([values for *_, values in layer], dim=1) for layer in pieces])
                for slab, run in self._write(keys, values, self._read_cold_ids(document, first, count)):
                    if spans and spans[-1][0] is slab and spans[-1][1][1] == run[0]:
                        spans[-1] = (slab, (spans[-1][1][0], run[1]))
                    else:
                        spans.append((slab, run))
        except BaseException:
            for slab, run in spans:
                slab.dead += run[1] - run[0]
            raise
        return spans

    def _move(self, slab: Slab, run: Run) -> list[tuple[Slab, Run]]:
        read = [slab.read(layer, run) for layer in range(len(self.spec.layers))]
        return self._write(torch.stack([r[0] for r in read]), torch.stack([r[1] for r in read]), read[0][2])

    def _admit(self, document: LiveDocument) -> None:
        offset = 0
        for slab, run in document.spans:
            slab.admit(document.row.id, offset, run)
            offset += run[1] - run[0]
        self.documents[document.row.id] = document

    def _replace_spans(self, document: LiveDocument, slab: Slab, fresh: dict[Run, list[tuple[Slab, Run]]]) -> None:
        known = self.documents.get(document.row.id)
        if known is None or known.row.pk != document.row.pk:
            for written, run in (span for spans in fresh.values() for span in spans):
                written.dead += run[1] - run[0]
            return
        spans: list[tuple[Slab, Run]] = []
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
        self._version += 1
        self._plans.clear()

    def _retire(self, release: Callable[[], None]) -> None:
        self._retired.append((self._version, release))

    def _release(self) -> None:
        """Run what waited for readers that are now gone."""
        with self._state:
            oldest = min(self._readers, default=self._version)
            due = [release for version, release in self._retired if version <= oldest]
            self._retired = [(version, release) for version, release in self._retired if version > oldest]
        for release in due:
            release()


def _moved(row: DocumentRow, part: int, place: tuple[int, int]) -> DocumentRow:
    parts = tuple(place if number == part else old for number, old in enumerate(row.parts))
    return DocumentRow(
        row.pk, row.id, row.generation, row.tokens, row.metadata, row.committed_at, row.request_id, parts
    )
