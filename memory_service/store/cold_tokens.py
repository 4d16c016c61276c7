"""The tokens of documents on disk: in segments, of which some are replaced while they are still read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from memory_service.storage.parts import SegmentRef
from memory_service.storage.records import MemoryRow
from memory_service.storage.segments import SegmentFiles
from memory_service.store.live_document import LiveDocument

_PIECE_BYTES = 16 << 20  # Read at a time.


class ColdTokens:
    """One memory's. `files` is None where nothing is durable; then there is nothing to read."""

    def __init__(self, row: MemoryRow, files: SegmentFiles | None):
        self.segments: dict[int, SegmentRef] = {}
        self._row = row
        self._files = files
        self._retiring: dict[int, SegmentRef] = {}  # Compacted, but known to a reader.

    def read(self, document: LiveDocument, layer: int, first: int, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Keys and values [H, T, D] of a document's tokens, in pieces: (first token, keys, values)."""
        assert self._files is not None, "what is not durable is in RAM"
        spec = self._row.spec
        step = max(1, _PIECE_BYTES // (spec.bytes_per_token // len(spec.layers)))
        for ref, part, base, start, stop in self._parts(document, first, count):
            for at in range(start, stop, step):
                size = min(step, stop - at)
                place = (self._row.key, ref, part)
                keys = self._files.read_tensor(*place, "keys", layer, at - base, size)
                values = self._files.read_tensor(*place, "values", layer, at - base, size)
                yield at, keys, values

    def read_whole(self, document: LiveDocument) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All layers of a document, in pieces: keys and values [L, H, T, D], token ids [T]."""
        spec = self._row.spec
        step = max(1, _PIECE_BYTES // spec.bytes_per_token)
        for first in range(0, document.row.tokens, step):
            count = min(step, document.row.tokens - first)
            pieces = [list(self.read(document, layer, first, count)) for layer in range(len(spec.layers))]
            keys = torch.stack([torch.cat([keys for _, keys, _ in layer], dim=1) for layer in pieces])
            values = torch.stack([torch.cat([values for *_, values in layer], dim=1) for layer in pieces])
            yield keys, values, self.read_ids(document, first, count)

    def read_ids(self, document: LiveDocument, first: int, count: int) -> Tensor:
        """Token ids [T]."""
        assert self._files is not None, "what is not durable is in RAM"
        found = [
            self._files.read_ids(self._row.key, ref, part, start - base, stop - start)
            for ref, part, base, start, stop in self._parts(document, first, count)
        ]
        return torch.cat(found)

    def retire(self, segments: Iterable[int]) -> None:
        """They are replaced, but can be read until they are dropped."""
        for pk in segments:
            self._retiring[pk] = self.segments[pk]  # Readers take no lock: it is always in one of the two.
            del self.segments[pk]

    def drop(self, segments: Iterable[int]) -> None:
        """Nobody reads them any more."""
        for pk in segments:
            del self._retiring[pk]

    def _parts(self, document: LiveDocument, first: int, count: int) -> Iterator[tuple[SegmentRef, int, int, int, int]]:
        """Where the tokens are: (segment, part, the part's first token, first wanted, end of those wanted)."""
        for segment, part in document.row.parts:
            ref = self.segments.get(segment) or self._retiring[segment]
            header = ref.parts[part].header
            start, stop = max(first, header.first_token), min(first + count, header.first_token + header.tokens)
            if start < stop:
                yield ref, part, header.first_token, start, stop
