"""Training on documents of one's own: files of any format, packed as LongLLaMA's authors pack them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from memory_service.errors import InvalidArgument
from model_worker import corpus
from model_worker.tasks.tokens import Tokenizer
from model_worker.training.packing import Document, Windows, packed
from model_worker.training.reads import Reads, grouped, released
from model_worker.training.shapes import Batch, Shape


class DocumentSource:
    """Windows of documents in random order, a document's windows side by side in a batch and on into the next batch.

    All texts are tokenised at the start and stay in RAM, 8 bytes a token. Where a document is cut depends on all
    batches before, so a step is reached by packing anew from the first: a millisecond a step when a training resumes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        *,
        paths: Sequence[str],
        min_tokens: int = 0,
        pad: bool = False,
        cross_batch_range: int | None = None,
        stepping: bool = False,
    ):
        """`paths`: files and folders. `min_tokens`: shorter documents are left out. `pad`: every document begins a row.

        `cross_batch_range` and `stepping` choose the authors' rule of which windows read which; without a range, the
        last window of a document reads all others of its group. Raises NotFound and InvalidArgument.
        """
        wanted = [paths] if isinstance(paths, str) else list(paths)
        if not wanted:
            raise InvalidArgument('the source documents needs paths = ["…"], files or folders to train on')
        self._seed, self._pad = seed, pad
        self._range, self._stepping = cross_batch_range, stepping
        self._documents = [one for one in _read(wanted, tokenizer) if len(one.tokens) >= min_tokens]
        if not self._documents:
            raise InvalidArgument(f"no document in {', '.join(wanted)} has {max(min_tokens, 1)} tokens or more")
        self._streams: dict[tuple[int, int, int], tuple[int, Iterator[Windows]]] = {}

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(one.tokens) for one in self._documents)

    def batch(self, step: int, shape: Shape) -> Batch:
        """The batch of a step: as many batches of this shape come before it."""
        key = (shape.documents, shape.windows, shape.window)
        following, stream = self._streams.get(key, (0, None))
        if stream is None or step < following:
            following, stream = 0, self._packed(shape)
        for _ in range(following, step):
            next(stream)
        windows = next(stream)
        self._streams[key] = (step + 1, stream)
        return Batch(
            ids=windows.ids,
            targets=windows.targets,
            weights=windows.weights,
            answers=torch.zeros_like(windows.ids, dtype=torch.bool),
            reads=self._reads(shape),
            rows_per_document=shape.windows,
        )

    def _reads(self, shape: Shape) -> Reads:
        if self._range is None:
            return grouped(shape.documents, shape.windows, shape.group)
        return released(shape.documents * shape.windows, self._range, shape.windows, self._stepping)

    def _packed(self, shape: Shape) -> Iterator[Windows]:
        rows = shape.documents * shape.windows
        return packed(self._endless(), rows, shape.window, packing=shape.windows, pad=self._pad)

    def _endless(self) -> Iterator[Document]:
        """All documents, then all of them again in another order."""
        epoch = 0
        while True:
            for place in np.random.default_rng((self._seed, epoch)).permutation(len(self._documents)):
                yield self._documents[place]
            epoch += 1


def _read(paths: Sequence[str], tokenizer: Tokenizer) -> Iterator[Document]:
    for source in corpus.read(paths):
        ids = source.token_ids if source.token_ids is not None else tokenizer.encode(source.text or "")
        if len(ids) == 0:
            continue
        if max(ids) >= tokenizer.size:
            raise InvalidArgument(f"document {source.id} has token {max(ids)}, the tokenizer has {tokenizer.size}")
        whole = Document.of(ids, tokenizer.begin, tokenizer.end)
        # Lists of Python numbers would take ten times the room.
        yield Document(
            np.array(whole.tokens, dtype=np.int32),  # type: ignore[arg-type]
            np.array(whole.weights, dtype=np.float32),  # type: ignore[arg-type]
        )
