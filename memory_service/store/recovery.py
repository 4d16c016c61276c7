"""What a crash interrupted is finished here, at every open; with an empty catalogue the same steps rebuild it.

Every acknowledged change is in two places: a commit in the catalogue and in its segments' headers, a delete in the
catalogue and in the tombstone log, a memory in the catalogue and in its memory.json. Either side completes the other.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from memory_service.errors import DataLoss, Internal
from memory_service.shards import stamp_at
from memory_service.storage.catalog import Catalog
from memory_service.storage.parts import SegmentRef
from memory_service.storage.records import MemoryRow, SegmentRow
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.tombstones import EVERYTHING, Tombstone
from memory_service.storage.vfs import Vfs

REPLICA_DAYS = 10.0  # How long a deletion is remembered for replicas that were down.
SPARE_TOMBSTONES = 10_000  # Lines no segment needs any more, before the log is rewritten without them.


@dataclass(slots=True)
class Recovery:
    """What was found and done."""

    adopted: int = 0  # Documents the catalogue did not know.
    deleted: int = 0  # Documents the catalogue did not know to be deleted.
    removed: int = 0  # Files nobody needs.
    missing: list[tuple[str, str]] = field(
        default_factory=list
    )  # (memory key, segment path) gone or of another length.
    problems: list[str] = field(default_factory=list)  # Sentences on what was left alone.


def recover(catalog: Catalog, files: SegmentFiles, *, rebuild: bool = False) -> Recovery:
    """Bring catalogue and files together; before anything is served. Costs one look at every directory, no payload.

    A segment the catalogue does not know is adopted if its documents are whole and newer than all it knows (a commit
    that was not acknowledged may take effect, an acknowledged one must), else removed. Raises DataLoss if there are
    segments but the catalogue is empty, unless `rebuild`.
    """
    found = Recovery()
    found.removed += files.sweep_staging()
    for key in catalog.deleted_memories():
        _drop_memory(catalog, files, key)
    _meet_unknown_memories(catalog, files, found, rebuild)
    for memory in catalog.memories():
        if files.tombstones.covers(memory.key, EVERYTHING, 0):
            catalog.delete_memory(memory.key)
            _drop_memory(catalog, files, memory.key)
        else:
            _adopt_segments(catalog, files, memory, found)
            _agree_on_deletes(catalog, files, memory.key, found)
    _trim_tombstones(catalog, files)
    return found


def rebuild_catalog(path: Path, root: Path, vfs: Vfs) -> Recovery:
    """Put the catalogue at `path` aside and build a new one from what lies under `root`."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for name in vfs.list_directory(path.parent):
        if name in (path.name, path.name + "-wal", path.name + "-journal"):
            vfs.rename(path.with_name(name), path.with_name(f"{name}.damaged-{stamp}"))
    vfs.fsync_directory(path.parent)
    with SegmentFiles(root, vfs) as files, Catalog.open(path, vfs=vfs) as catalog:
        return recover(catalog, files, rebuild=True)


def _drop_memory(catalog: Catalog, files: SegmentFiles, key: str) -> None:
    files.abandon_memory(key)
    catalog.forget_memory(key)


def _meet_unknown_memories(catalog: Catalog, files: SegmentFiles, found: Recovery, rebuild: bool) -> None:
    known = {memory.key: (memory.tenant, memory.name) for memory in catalog.memories()}
    unknown = [key for key in files.memory_keys() if key not in known]
    half = {key for key in unknown if files.restoring(key) and not (rebuild and _described(files, key))}
    for key in half:
        files.abandon_memory(key)
    unknown = [key for key in unknown if key not in half]
    if not rebuild and not known and any(next(files.scan(key), None) for key in unknown):
        raise DataLoss(
            "there are segments but the catalogue knows no memory; put the right catalogue back, or run "
            "`fot verify --rebuild-catalog` to build it from the segments"
        )
    for key in unknown:
        if files.tombstones.covers(key, EVERYTHING, 0):
            files.drop_memory(key)
            continue
        try:
            memory = files.read_memory(key)
        except DataLoss as error:
            if next(files.scan(key), None) is None:
                files.drop_memory(key)  # Its creation did not get far enough to be acknowledged.
            else:
                found.problems.append(f"memory {key} was left alone: {error.message}")
            continue
        if (memory.tenant, memory.name) in known.values():
            found.problems.append(f"memory {key} was left alone: its name is taken by another one")
            continue
        catalog.create_memory(MemoryRow(key, memory.tenant, memory.name, memory.spec, memory.created_at))
        known[key] = (memory.tenant, memory.name)


def _described(files: SegmentFiles, key: str) -> bool:
    """Whether a memory's description, which is the last thing a restore writes, is there."""
    try:
        files.read_memory(key)
    except DataLoss:
        return False
    return True


def _adopt_segments(catalog: Catalog, files: SegmentFiles, memory: MemoryRow, found: Recovery) -> None:
    rows = catalog.segments(memory.key)
    known = {row.ref.path: row.ref for row in rows}
    gone = [row for row in rows if not files.present(memory.key, row.ref)]
    strangers: list[SegmentRef] = []
    keep = set(known)
    for one in files.scan(memory.key):
        if one.path in known:
            continue
        if one.segment is None or one.spec != memory.spec:
            keep.add(one.path)
            found.problems.append(f"{one.path} was left alone: {one.problem or 'it belongs to another memory'}")
        else:
            strangers.append(one.segment)
    if gone:
        keep |= _stand_in(catalog, memory.key, gone, strangers, found)
    alive = {
        (document, generation)
        for document, generation in _newest_whole(strangers)
        if generation >= memory.next_generation and not files.tombstones.covers(memory.key, document, generation)
    }
    needed = _holders(strangers, alive)
    if needed:
        found.adopted += len(catalog.adopt(memory.key, needed, alive).documents)
    found.removed += files.sweep(memory.key, keep | {segment.path for segment in needed})


def _stand_in(
    catalog: Catalog, key: str, gone: list[SegmentRow], strangers: list[SegmentRef], found: Recovery
) -> set[str]:
    """Let unknown segments take the place of known ones whose files are gone; the files to keep.

    A compaction whose transaction a damaged log lost looks like this: its new segments are the only copy.
    """
    alive = {(row.id, row.generation) for row in catalog.documents(key)}
    headers = [part.header for row in gone for part in row.ref.parts]
    wanted = {(one.document, one.generation) for one in headers} & alive
    copies = _holders(strangers, wanted)
    try:
        catalog.compact(key, copies, [row.pk for row in gone])
    except Internal:  # Some live part has no copy: change nothing, say which files are missing, keep what there is.
        found.missing += [(key, row.ref.path) for row in gone]
    return {segment.path for segment in copies}


def _newest_whole(segments: Iterable[SegmentRef]) -> set[tuple[str, int]]:
    """(id, generation) of every document whose parts are all there, the newest generation of each id only."""
    parts: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)  # -> part -> tokens
    wanted: dict[tuple[str, int], tuple[int, int]] = {}  # -> (parts, tokens)
    for header in (part.header for segment in segments for part in segment.parts):
        name = (header.document, header.generation)
        parts[name][header.part] = header.tokens
        wanted[name] = (header.parts, header.document_tokens)
    whole = [name for name, have in parts.items() if (len(have), sum(have.values())) == wanted[name]]
    return set(dict(sorted(whole)).items())


def _holders(segments: Iterable[SegmentRef], alive: set[tuple[str, int]]) -> list[SegmentRef]:
    """The segments that hold a part of a document in `alive` which none before them holds."""
    seen: set[tuple[str, int, int]] = set()
    holders = []
    for segment in segments:
        headers = [part.header for part in segment.parts]
        parts = {(one.document, one.generation, one.part) for one in headers if (one.document, one.generation) in alive}
        if parts - seen:
            holders.append(segment)
            seen |= parts
    return holders


def _agree_on_deletes(catalog: Catalog, files: SegmentFiles, key: str, found: Recovery) -> None:
    alive = catalog.documents(key)
    lost = [row.pk for row in alive if files.tombstones.covers(key, row.id, row.generation)]
    if lost:
        catalog.tombstone(key, lost)
        found.deleted += len(lost)
    names = {row.id for row in alive}
    # A replaced document needs no line: a rebuild takes the newest generation.
    files.tombstones.add(Tombstone(key, *one) for one in catalog.dead_documents(key) if one[0] not in names)


def _trim_tombstones(catalog: Catalog, files: SegmentFiles) -> None:
    # Only here: no file is left that the catalogue forgot, so a line that no segment needs can bring nothing back.
    keys = {memory.key for memory in catalog.memories()}
    entries = files.tombstones.entries
    if len(entries) <= sum(len(catalog.dead_documents(key)) for key in keys) + SPARE_TOMBSTONES:
        return
    held = _documents_in_segments(files, keys)
    if held is None:
        return
    # What was stamped lately may still be alive in a replica that was down.
    recent = stamp_at(time.time() - REPLICA_DAYS * 86_400)
    late = {name for name, generation in entries.items() if generation > recent and name[0] in keys}
    files.tombstones.rewrite(Tombstone(*name, entries[name]) for name in held | late if name in entries)


def _documents_in_segments(files: SegmentFiles, keys: Iterable[str]) -> set[tuple[str, str]] | None:
    """(memory key, document) of all that segments hold, alive or dead; None if one cannot be read.

    Asked of the headers: a catalogue that was rebuilt does not know whose the dead bytes are.
    """
    held = set()
    for key in keys:
        for one in files.scan(key):
            if one.segment is None:
                return None
            held |= {(key, part.header.document) for part in one.segment.parts}
    return held
