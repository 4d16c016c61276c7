"""What a store does for its memories between calls: warm, index, compact, verify. Every step can be left out.

Readers go on throughout: each step makes the new thing aside and then swaps it in.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from memory_service.errors import DataLoss, FotError
from memory_service.index import faiss_index
from memory_service.index.factories import choose_factory
from memory_service.index.unit import IndexedDocument, IndexUnit
from memory_service.storage.catalog import Catalog
from memory_service.storage.parts import CHUNK_BYTES, PartHeader, PartRef, SegmentRef
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.staging import Staging
from memory_service.storage.vfs import StorageFailed, Vfs
from memory_service.store.live_document import LiveDocument
from memory_service.store.live_memory import LiveMemory
from memory_service.types.callers import Cancel

Progress = Callable[[int, int], None]  # Units done, units in all.

_SMALL_SEGMENT = 32 << 20  # Segments below this are worth merging, …
_MANY_SMALL = 16  # … once there are this many.
_MERGE_BYTES = 128 << 20  # Live bytes rewritten into one new set of segments.
_GONE = -1  # Primary key of a document that is deleted.
_TIER = 4  # A unit is merged into a new one that is at least a quarter of its size.


class Upkeep:
    """The background work of one store. Each method runs to its end in the calling thread."""

    def __init__(self, catalog: Catalog, files: SegmentFiles | None, vfs: Vfs, root: Path | None):
        self._catalog = catalog
        self._files = files
        self._vfs = vfs
        self._indexes = None if root is None else root / "indexes"
        self._building = threading.Lock()  # One index build at a time: it takes every core it gets.

    # --- Warm -------------------------------------------------------------------------------------------------------

    def warm(self, memory: LiveMemory, cancel: Cancel) -> int:
        """Bring cold documents into RAM, newest first, while the budget allows; how many."""
        if self._files is None:
            return 0
        moved = 0
        cold = [document for document in memory.documents.copy().values() if not document.spans]
        for document in sorted(cold, key=lambda one: -one.row.generation):
            cancel.check()
            try:
                with memory.filling, memory.reading():
                    known = memory.documents.get(document.row.id)
                    if known is None or known.spans or known.row.pk != document.row.pk:
                        continue
                    if not memory.promote(known, cancel):
                        break
            except DataLoss:
                continue  # A query that needs it, or a verify, says so; the others need not wait.
            moved += 1
        return moved

    # --- Indexes ----------------------------------------------------------------------------------------------------

    def wants_index(self, memory: LiveMemory) -> bool:
        """Whether enough tokens wait for an index."""
        policy = memory.spec.index
        if policy.factory == "none":
            return False
        inside = {one.pk for unit in memory.units for one in unit.documents}
        waiting = sum(one.row.tokens for one in memory.documents.copy().values() if one.row.pk not in inside)
        return waiting >= policy.min_tokens or any(_mostly_dead(unit, memory) for unit in memory.units)

    def build_index(self, memory: LiveMemory, progress: Progress, cancel: Cancel, factory: str = "") -> str:
        """Index what is not indexed, merging smaller units in; with a factory everything anew; a sentence on it."""
        with self._building, memory.reading():
            keep, documents = _choose(memory, anew=bool(factory))
            total = sum(document.row.tokens for document in documents)
            if not total:
                return "every document is indexed already"
            spec = memory.spec
            done = 0

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens
                progress(done, total * len(spec.layers))

            def read(position: int, layer: int) -> Tensor:
                return _keys(memory, documents[position], layer)

            members = [IndexedDocument(one.row.pk, one.row.generation, one.row.tokens) for one in documents]
            factory = choose_factory(total, spec.head_dim, factory or spec.index.factory)
            unit = faiss_index.build(secrets.token_hex(8), members, spec, factory, read, cancel, advance)
            if self._indexes is not None:
                faiss_index.save(unit, self._indexes / memory.row.key / unit.name, self._vfs)
        gone = [one for one in memory.units if one not in keep]
        memory.set_units((*keep, unit))
        for one in gone:
            self._drop_index(memory, one.name)
        return f"indexed {total:,} tokens of {len(documents):,} documents with {factory}"

    def load_indexes(self, memory: LiveMemory) -> None:
        """Take up the sidecars of an earlier run; any that does not match in every detail is deleted."""
        if self._indexes is None:
            return
        rows = {one.row.pk: one.row for one in memory.documents.copy().values()}
        units: list[IndexUnit] = []
        directory = self._indexes / memory.row.key
        for name in self._vfs.list_directory(directory):
            unit = faiss_index.load(directory / name, self._vfs, memory.spec)
            if unit is None:
                continue
            known = [rows.get(one.pk) for one in unit.documents]
            fits = all(
                row is None or (row.generation, row.tokens) == (one.generation, one.tokens)
                for row, one in zip(known, unit.documents, strict=True)
            )
            if fits and any(row is not None for row in known):
                # A rebuilt catalogue gives keys out anew: what is gone must not come back as another document.
                mine = zip(known, unit.documents, strict=True)
                units.append(
                    replace(unit, documents=tuple(one if row else replace(one, pk=_GONE) for row, one in mine))
                )
            else:
                self._drop_index(memory, name)
        memory.set_units(tuple(sorted(units, key=lambda unit: -unit.tokens)))

    def drop_indexes(self, key: str) -> None:
        """Forget every sidecar of a deleted memory."""
        if self._indexes is not None:
            self._vfs.remove_directory(self._indexes / key)

    def sweep_indexes(self, keep: set[str]) -> None:
        """Remove the sidecars of memories that are gone."""
        if self._indexes is not None:
            for key in self._vfs.list_directory(self._indexes):
                if key not in keep:
                    self.drop_indexes(key)

    def _drop_index(self, memory: LiveMemory, name: str) -> None:
        if self._indexes is not None:
            self._vfs.remove_directory(self._indexes / memory.row.key / name)

    # --- Segments ---------------------------------------------------------------------------------------------------

    def wants_compaction(self, memory: LiveMemory) -> bool:
        """Whether a third of some segment is dead, many are small, or half of a slab is dead."""
        if any(slab.dead * 2 > max(slab.used) > 0 for slab in memory.slabs):
            return True
        return bool(self._files is not None and _compactable(memory, force=False))

    def compact(self, memory: LiveMemory, progress: Progress, cancel: Cancel, *, force: bool = True) -> str:
        """Rewrite live documents out of small and holey segments, then drop those; a sentence on the outcome."""
        with memory.filling:
            memory.tidy()
        files = self._files
        if files is None:
            return "wrote RAM anew where it was mostly dead"
        before = memory.dead_bytes
        chosen = _compactable(memory, force=force)
        chosen.sort(key=lambda pk: bool(_live_parts(memory, pk)))
        total = sum(memory.segments[pk].nbytes for pk in chosen)
        done = 0
        while chosen:
            cancel.check()
            batch: list[int] = []
            size = 0
            while chosen and (not batch or size < _MERGE_BYTES):
                live = sum(part.nbytes for _, part, _ in _live_parts(memory, chosen[0]))
                if batch and live and not size:
                    break  # What is wholly dead goes by itself: that needs no room on a full disk, and makes some.
                batch.append(chosen.pop(0))
                size += live
            done += sum(memory.segments[pk].nbytes for pk in batch)
            self._rewrite(files, memory, batch, cancel)
            progress(done, total)
        return f"dropped {max(0, before - memory.dead_bytes):,} dead bytes; {len(memory.segments)} segments remain"

    def _rewrite(self, files: SegmentFiles, memory: LiveMemory, batch: Sequence[int], cancel: Cancel) -> None:
        key = memory.row.key
        with memory.writing:  # No commit or delete may change which parts are live meanwhile.
            if memory.deleted:
                return
            old = [memory.segments[pk] for pk in batch]
            stagings: list[tuple[PartHeader, Staging]] = []
            try:
                for ref, place, header in [
                    (memory.segments[pk], place, part.header)
                    for pk in batch
                    for place, part, _ in _live_parts(memory, pk)
                ]:
                    staging = files.stage(key, ref.parts[place].layout)
                    stagings.append((header, staging))
                    _copy(files, key, ref, place, staging, cancel)
                refs = files.seal(key, memory.spec, stagings) if stagings else []
            except BaseException:
                for _, staging in stagings:
                    staging.discard()
                raise
            try:
                rows = self._catalog.compact(key, refs, batch)
            except StorageFailed:
                raise  # Whether the transaction took effect is not known: touch nothing, the next open decides.
            except FotError:
                for ref in refs:
                    files.remove(key, ref.path, durable=True)
                raise

            def release() -> None:
                for ref in old:
                    files.remove(key, ref.path)

            memory.replace_segments([(row.pk, row.ref) for row in rows], batch, release)

    # --- Verify -----------------------------------------------------------------------------------------------------

    def verify(self, memory: LiveMemory, progress: Progress, cancel: Cancel) -> str:
        """Read every byte of every segment against its checksum; DataLoss names all that fail."""
        files = self._files
        if files is None:
            return "nothing of this memory is on disk"
        with memory.reading():
            refs = list(memory.segments.copy().values())
            total, done = sum(ref.nbytes for ref in refs), 0
            problems: list[str] = []

            def advance(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                progress(done, total)

            for ref in refs:
                try:
                    files.verify(memory.row.key, ref, cancel, advance)
                except DataLoss as error:
                    problems.append(error.message)
        if problems:
            raise DataLoss(f"{len(problems)} of {len(refs)} segments are damaged: " + "; ".join(problems[:5]))
        return f"{total:,} bytes in {len(refs)} segments match their checksums"


def _choose(memory: LiveMemory, anew: bool) -> tuple[list[IndexUnit], list[LiveDocument]]:
    """Units that stay, and the documents of the new one: what no unit holds, and units too small to stand beside it."""
    live = {document.row.pk: document for document in memory.documents.copy().values()}
    if anew:
        return [], [live[pk] for pk in sorted(live)]
    inside = {one.pk for unit in memory.units for one in unit.documents}
    fresh = {pk: document for pk, document in live.items() if pk not in inside}
    keep = sorted(memory.units, key=lambda unit: -unit.tokens)
    tokens = sum(document.row.tokens for document in fresh.values())
    for unit in sorted(memory.units, key=lambda unit: unit.tokens):
        if _mostly_dead(unit, memory) or (tokens and unit.tokens < _TIER * tokens):
            keep.remove(unit)
            mine = {one.pk: live[one.pk] for one in unit.documents if one.pk in live}
            fresh |= mine
            tokens += sum(document.row.tokens for document in mine.values())
    return keep, [fresh[pk] for pk in sorted(fresh)]


def _mostly_dead(unit: IndexUnit, memory: LiveMemory) -> bool:
    live = {document.row.pk for document in memory.documents.copy().values()}
    return sum(one.tokens for one in unit.documents if one.pk in live) * 2 < unit.tokens


def _keys(memory: LiveMemory, document: LiveDocument, layer: int) -> Tensor:
    """All keys of a document at a layer (by index): [H, T, D]."""
    return memory.read(document, layer, 0, document.row.tokens)[0]


def _compactable(memory: LiveMemory, *, force: bool) -> list[int]:
    """Segments worth rewriting: with dead bytes, or small ones if there are many."""
    sizes = {
        pk: (sum(part.nbytes for part in ref.parts), sum(part.nbytes for _, part, _ in _live_parts(memory, pk)))
        for pk, ref in memory.segments.copy().items()
    }
    holey = {pk for pk, (size, live) in sizes.items() if live < size * (1.0 if force else 2 / 3)}
    small = {pk for pk, (size, live) in sizes.items() if live and size < _SMALL_SEGMENT}
    if len(small) >= (2 if force else _MANY_SMALL):
        holey |= small
    return sorted(holey)


def _live_parts(memory: LiveMemory, pk: int) -> list[tuple[int, PartRef, LiveDocument]]:
    """Parts of a segment that belong to live documents: (place, part, document)."""
    found = []
    for place, part in enumerate(memory.segments[pk].parts):
        document = memory.documents.get(part.header.document)
        if document and document.row.generation == part.header.generation and (pk, place) in document.row.parts:
            found.append((place, part, document))
    return found


def _copy(files: SegmentFiles, key: str, ref: SegmentRef, place: int, staging: Staging, cancel: Cancel) -> None:
    """Copy a part chunk by chunk; its checksums go with it, so damage cannot be copied unseen."""
    part = ref.parts[place]
    buffer = bytearray(CHUNK_BYTES)
    for chunk, crc in enumerate(part.header.crcs):
        cancel.check()
        view = memoryview(buffer)[: part.layout.chunk_nbytes(chunk)]
        files.read(key, ref, place, chunk * CHUNK_BYTES, view)
        staging.write(chunk * CHUNK_BYTES, crc, view)
