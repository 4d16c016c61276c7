"""Documents into keys and values: each encoded on its own, so that the order of ingestion never changes an answer.

L memory layers, K key/value heads, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memory_service import Memory, MemorySpec, Partial
from memory_service.errors import InvalidArgument
from model_worker.decoder.loading import SessionStore, cut, load
from model_worker.decoder.model import LEASE_S, FotModel
from model_worker.decoder.steps import Piece
from model_worker.recall.reader import Promise, Reader
from model_worker.recall.rows import Rows
from model_worker.settings import Recall

OVERLAP = 32  # Tokens. A passkey cut in two by a window border is then seen whole by one window.
_AHEAD = 4  # Blocks of documents looked at together, so that windows of one length meet.


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A document as a memory stores it; keys are not rotated."""

    token_ids: Tensor  # [T] int64
    keys: Tensor  # [L, K, T, D] in the memory's dtype
    values: Tensor  # [L, K, T, D]


class Encoder:
    """Turns token ids into keys and values with a FotModel's decoder and its windows.

    A document's windows see their own earlier windows and no other document. Each also recomputes `overlap` tokens of
    left context that it does not store (0: the authors' disjoint windows). With one memory layer all windows of all
    documents run side by side; with more, those of a document still do, layer by layer.
    """

    def __init__(
        self,
        model: FotModel,
        overlap: int | None = None,
        block_tokens: int | None = None,
        on_block: Callable[[int], None] | None = None,
    ):
        """`on_block` hears how many tokens each finished block of windows added. Raises InvalidArgument."""
        if not model.fot.mem_layers:
            raise InvalidArgument("encoding needs memory layers: open the model with mem_layers=(…)")
        if overlap is None:
            overlap = min(OVERLAP, model.fot.window // 4)
        if not 0 <= overlap < model.fot.window:
            raise InvalidArgument(f"overlap must be 0 to window - 1 = {model.fot.window - 1}, got {overlap}")
        self.model = model
        self.overlap = overlap
        self.fot = replace(model.fot, block_tokens=block_tokens or model.fot.block_tokens)
        self._on_block = on_block

    @property
    def spec(self) -> MemorySpec:
        """What a memory of these documents must be."""
        return self.model.spec

    def encode(self, documents: Iterable[Sequence[int] | Tensor]) -> Iterator[Encoded]:
        """The documents' keys and values, in order; looks a few blocks of tokens ahead.

        Raises InvalidArgument for a document without tokens.
        """
        group: list[Tensor] = []
        tokens = 0
        for document in documents:
            ids = torch.as_tensor(document, dtype=torch.int64)
            if ids.ndim != 1 or not len(ids):
                raise InvalidArgument(f"a document must be a list of at least one token id, got {list(ids.shape)}")
            group.append(ids)
            tokens += len(ids)
            if tokens >= _AHEAD * self.fot.block_tokens:
                yield from self._encode(group)
                group, tokens = [], 0
        if group:
            yield from self._encode(group)

    @torch.no_grad()
    def _encode(self, texts: list[Tensor]) -> list[Encoded]:
        fot, spec, decoder = self.fot, self.spec, self.model.decoder
        encoded = [_room(ids, spec) for ids in texts]
        pieces = [
            piece for row, ids in enumerate(texts) for piece in cut(row, len(ids), fot.window, self.overlap)
        ]  # fmt: skip
        # Whole windows first: a text's last window is its shortest, so its windows stay in order.
        pieces.sort(key=lambda piece: -piece.tokens)
        if len(fot.mem_layers) == 1:
            load(decoder, fot, self.model.policies, pieces, texts, _Kept(encoded, spec), None, self._on_block)
            return encoded
        with Memory.open(":memory:", spec=spec) as scratch:
            reader, rows = Reader(scratch), Rows(lambda: scratch.session(LEASE_S))
            rows.resize(len(texts))
            earlier = SessionStore(reader, rows, texts, Recall(documents=()))
            load(decoder, fot, self.model.policies, pieces, texts, _Kept(encoded, spec, earlier), None, self._on_block)
        return encoded


class _Kept:
    """Writes what windows leave into the documents' tensors; earlier windows are read from a session in process."""

    def __init__(self, documents: Sequence[Encoded], spec: MemorySpec, earlier: SessionStore | None = None):
        self._documents = documents
        self._spec = spec
        self._earlier = earlier

    def append(self, layer: int, pieces: Sequence[Piece], keys: Tensor, values: Tensor) -> None:
        """Store the fresh tokens of every window."""
        at = self._spec.layer_index(layer)
        for number, piece in enumerate(pieces):
            document = self._documents[piece.row]
            document.keys[at, :, piece.fresh : piece.stop] = keys[number, :, piece.kept]
            document.values[at, :, piece.fresh : piece.stop] = values[number, :, piece.kept]
        # The last layer's keys are never read while encoding.
        if self._earlier is not None and layer != self._spec.layers[-1]:
            self._earlier.append(layer, pieces, keys, values)

    def attend(self, layer: int, pieces: Sequence[Piece], queries: Tensor, scale: float) -> Promise[Partial] | None:
        """Attention to the windows before, in memory layers that others follow."""
        return None if self._earlier is None else self._earlier.attend(layer, pieces, queries, scale)


def _room(ids: Tensor, spec: MemorySpec) -> Encoded:
    shape = (len(spec.layers), spec.kv_heads, len(ids), spec.head_dim)
    return Encoded(ids, torch.empty(shape, dtype=spec.dtype.torch), torch.empty(shape, dtype=spec.dtype.torch))
