"""Which rows of a batch each row's memory layers read in training: recipes of the Focused Transformer (2307.03170).

A recipe gives, for every row, the other rows it reads; itself it always sees, causally, and that is not listed.
"""

from __future__ import annotations

from collections.abc import Sequence

from memory_service.errors import InvalidArgument

Reads = tuple[tuple[int, ...], ...]  # One tuple a row.


def released(rows: int, cross_batch_range: int, packing: int = 1, stepping: bool = False) -> Reads:
    """LongLLaMA's own rule: row i reads the rows just before it, as many as its place among `packing` windows allows.

    With `packing` consecutive rows of one document, the nearest of them are positives and those before it negatives.
    `stepping` gives the first row of a document no reads and its last row all `cross_batch_range`; without it every row
    reads as many as there are. The first rows of a batch read fewer.
    """
    _check(rows=rows, packing=packing)
    if cross_batch_range < 0:
        raise InvalidArgument(f"cross_batch_range must be ≥ 0, got {cross_batch_range}")
    most = cross_batch_range + 1  # Rows attended to, the row itself included.
    step = -(-most // max(packing - 1, 1))

    def seen(row: int) -> int:
        allowed = min(row % packing * step + 1, most) if stepping and packing > 1 else most
        return min(allowed, row + 1)

    return tuple(tuple(range(row - 1, row - seen(row), -1)) for row in range(rows))


def packed(rows: int, positives: Sequence[int], negatives: Sequence[int], *, around: bool = False) -> Reads:
    """How many windows of its own document, and of those before it, each of a document's windows reads.

    `positives[j]` and `negatives[j]` are for the j-th of `len(positives)` consecutive rows; the nearest are read. It
    reaches recipes that `released` cannot, such as LongLLaMA 7B's (0, 1, 2, 3) and (0, 2, 5, 4). The first documents of
    a batch have fewer negatives, as in `released`, unless `around`: then the batch's last documents stand before them.
    """
    packing = len(positives)
    _check(rows=rows, packing=packing)
    if len(negatives) != packing or rows % packing:
        raise InvalidArgument(
            f"positives and negatives need one number for each window of a document, and {rows} rows whole documents; "
            f"got {packing} and {len(negatives)} numbers"
        )
    for place, (own, others) in enumerate(zip(positives, negatives, strict=True)):
        if not 0 <= own <= place or not 0 <= others <= rows - packing:
            raise InvalidArgument(
                f"window {place} of a document has {place} before it and {rows - packing} of other documents, "
                f"but would read {own} and {others}"
            )

    def reads(row: int) -> tuple[int, ...]:
        place = row % packing
        first = row - place
        own = range(row - 1, row - 1 - positives[place], -1)
        others = range(first - 1, first - 1 - negatives[place], -1)
        return (*own, *(other % rows for other in others if around or other >= 0))

    return tuple(reads(row) for row in range(rows))


def previous(documents: int, d: int) -> Reads:
    """The paper's small models: first the previous context of every document, then every current one.

    The current context of document i reads the previous ones of i (the positive), i + 1, …, i + d - 1, counted around
    the batch; previous contexts read nothing. `d` is the paper's cross-batch dimension.
    """
    _check(documents=documents)
    if not 0 <= d <= documents:
        raise InvalidArgument(f"d counts documents of the batch, 0 to {documents}, got {d}")
    return ((),) * documents + tuple(
        tuple((document + step) % documents for step in range(d)) for document in range(documents)
    )


def grouped(documents: int, windows: int, group: int) -> Reads:
    """The last window of a document reads all earlier windows of all documents of its group; the others read nothing.

    Rows are documents of `windows` rows each, one after the other; groups are `group` consecutive documents.
    """
    _check(documents=documents, windows=windows, group=group)
    if documents % group:
        raise InvalidArgument(f"{documents} documents do not make whole groups of {group}; choose a divisor")

    def earlier(document: int) -> tuple[int, ...]:
        first = document - document % group
        return tuple(one * windows + w for one in range(first, first + group) for w in range(windows - 1))

    return tuple(
        earlier(document) if window == windows - 1 else () for document in range(documents) for window in range(windows)
    )


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InvalidArgument(f"{name} must be ≥ 1, got {count}")
