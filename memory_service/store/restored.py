"""What a snapshot's files hold, compared with what it says: whole documents alive, all else dead for good."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from memory_service.errors import DataLoss, FotError, InvalidArgument
from memory_service.index.factories import check_factory
from memory_service.storage.parts import PartHeader, SegmentRef, spec_to_json
from memory_service.storage.snapshot_file import MAX_TIME, Contents, Description
from memory_service.storage.snapshot_files import Found, SnapshotFiles
from memory_service.storage.tombstones import Tombstone
from memory_service.store.uploads import Request
from memory_service.types.callers import Cancel
from memory_service.types.documents import Conflict


def described(files: SnapshotFiles, one: Found) -> Description:
    """What a snapshot says of itself; DataLoss if no memory can be made of that, NotFound if it is gone."""
    told = files.describe(one)
    try:
        check_factory(told.memory.spec.index.factory, told.memory.spec.head_dim)
    except InvalidArgument as error:
        raise DataLoss(error.message) from error
    return told


def segments_of(
    files: SnapshotFiles,
    one: Found,
    told: Description,
    contents: Contents,
    take: Callable[[Path, SegmentRef], None],
    cancel: Cancel,
) -> list[SegmentRef]:
    """Give each segment file to `take`, which reads it; DataLoss unless they hold the documents it names, whole."""
    found = []
    for entry in contents.segments:
        cancel.check()
        segment = files.segment(one, entry, spec_to_json(told.memory.spec))
        take(files.path(one) / entry.path, segment)
        found.append(segment)
    _check_restored([part.header for segment in found for part in segment.parts], contents, told)
    return found


def verify(files: SnapshotFiles, one: Found, progress: Callable[[int], None], cancel: Cancel) -> Description:
    """Read all that a restore would, and make nothing of it; DataLoss naming what is damaged.

    `progress` gets the bytes of each step.
    """
    told = described(files, one)
    contents = files.contents(one, told)
    if files.memory(one) != told.memory:
        raise DataLoss("memory.json is of another memory")

    def take(path: Path, segment: SegmentRef) -> None:
        files.copies.check(path, segment, progress, cancel)

    segments_of(files, one, told, contents, take, cancel)
    return told


def _check_restored(headers: Sequence[PartHeader], contents: Contents, told: Description) -> None:
    try:
        _check(headers, contents, told)
    except (TypeError, ValueError, AttributeError) as error:
        raise DataLoss("a segment's header makes no sense") from error


def dead_in(key: str, headers: Sequence[PartHeader], contents: Contents) -> list[Tombstone]:
    """Tombstones of all that a rebuilt catalogue must not bring back.

    An older state of a live document needs none: a rebuild takes the newest.
    """
    alive = {document for document, _ in contents.documents}
    dead: dict[str, int] = dict(contents.deleted)
    for header in headers:
        if header.document not in alive:
            dead[header.document] = max(header.generation, dead.get(header.document, 0))
    return [Tombstone(key, document, generation) for document, generation in sorted(dead.items())]


def _check(headers: Sequence[PartHeader], contents: Contents, told: Description) -> None:
    alive = dict(contents.documents)
    for header in headers:
        _check_header(header)
    parts: dict[str, dict[int, PartHeader]] = defaultdict(dict)
    for header in headers:
        generation = alive.get(header.document)
        if generation is None:
            continue
        if header.generation > generation:
            raise DataLoss(f"a segment holds a newer state of document {header.document!r} than the one that was kept")
        if header.generation == generation:
            parts[header.document][header.part] = header
    tokens = 0
    for document in alive:
        mine = [parts[document][number] for number in sorted(parts[document])]
        if not mine or not _is_whole(mine):
            raise DataLoss(f"document {document!r} is not whole in the segments that were kept")
        tokens += mine[0].document_tokens
    if tokens != told.tokens:
        raise DataLoss(f"the documents have {tokens:,} tokens, {told.tokens:,} were kept")


def _check_header(one: PartHeader) -> None:
    """Raise DataLoss unless the catalogue can hold what a part says of its document."""
    numbers = (one.generation, one.part, one.parts, one.first_token, one.tokens, one.document_tokens)
    times = isinstance(one.committed_at, int | float) and 0 <= one.committed_at < MAX_TIME
    if not times or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise DataLoss(f"a part of document {one.document!r} makes no sense")
    try:
        Request(one.document, one.document_tokens, one.metadata, Conflict.FAIL, one.request_id, 0).check()
    except FotError as error:
        raise DataLoss(f"document {one.document!r}: {error.message}") from error


def _is_whole(parts: Sequence[PartHeader]) -> bool:
    """Whether these parts, by number, are all of one document, one after the other."""
    first = 0
    for number, one in enumerate(parts):
        if (one.part, one.parts, one.first_token) != (number, len(parts), first):
            return False
        first += one.tokens
    return all(one.document_tokens == first for one in parts)
