"""A corpus into a memory: documents are tokenised, encoded and stored, each once; a second run goes on where one ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from memory_service import DocumentInfo, Memory, MemorySpec
from memory_service.types import Scalar
from model_worker.corpus import Notes, Source
from model_worker.encoding import Encoded
from model_worker.fitting import check_spec
from model_worker.intake import Fate, IngestReport, Intake, Ledger, Verdict
from model_worker.uploads import Outgoing, Uploads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encodes(Protocol):
    """What ingest asks of an `Encoder`."""

    @property
    def spec(self) -> MemorySpec: ...

    def encode(self, documents: Iterable[Sequence[int] | Tensor]) -> Iterator[Encoded]: ...


def ingest(
    sources: Iterable[Source],
    encoder: Encodes,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: Memory,
    *,
    settings: Mapping[str, Scalar] | None = None,
    special_tokens: bool = True,
    replace: bool = False,
    belongs: Callable[[DocumentInfo], bool] | None = None,
    notes: Notes | None = None,
    on_progress: Callable[[IngestReport], None] = lambda _: None,
) -> IngestReport:
    """Store every document of `sources` that the memory does not hold as it would be stored now.

    `settings` are kept with every document, and changing them encodes all again. A stored document is replaced if an
    ingest from the same root stored it, any other only with `replace`. `belongs` asks for pruning: stored documents it
    accepts that are not among `sources` are removed, at the end, unless part of the corpus could not be read.
    `notes` are those that reading takes; documents without tokens are added to them.
    `on_progress` is called in this thread, after every document, and with the outcome also when an error ends it: what
    was stored until then stays, and the same call goes on from there.
    Raises AlreadyExists for a document that is not ours to replace, WrongModel, and what `sources`, the encoder and
    `Memory.put` raise.
    """
    check_spec(memory.spec, encoder.spec)
    intake = Intake(memory, tokenizer, settings, special_tokens, replace)
    ledger = Ledger(notes or Notes(), on_progress)
    try:
        store(map(intake.decide, sources), encoder, memory, ledger)
        if belongs is not None:
            ledger.prune(memory, belongs)
    finally:
        ledger.tell()
    return ledger.report()


def store(
    verdicts: Iterable[Verdict], encoder: Encodes, memory: Memory, ledger: Ledger, request: str | None = None
) -> None:
    """Encode and put the documents that are to be; count all of them.

    `request` names the run: whoever stores a document twice in one run, as after a lost answer, commits it once.
    """

    def stored(document: Outgoing) -> None:
        ledger.count(Fate.REPLACED if document.replace else Fate.ADDED, 1)
        ledger.count("tokens", len(document.token_ids))

    waiting: deque[Verdict] = deque()
    with Uploads(memory, stored) as uploads:
        for encoded in encoder.encode(_wanted(verdicts, waiting, ledger, uploads.check)):
            one = waiting.popleft()
            ledger.count("bytes_read", one.size)
            uploads.put(
                Outgoing(
                    one.id, encoded.keys, encoded.values, encoded.token_ids, one.metadata, one.fate is Fate.REPLACED,
                    None if request is None else f"{request}-{one.digest}",
                )
            )  # fmt: skip
            ledger.tell()


def _wanted(
    verdicts: Iterable[Verdict], waiting: deque[Verdict], ledger: Ledger, check: Callable[[], None]
) -> Iterator[Tensor]:
    """Token ids of the documents to be encoded, which then wait for their keys and values in this order."""
    for one in verdicts:
        check()
        if one.note is not None:
            ledger.note(one.note)
            continue
        ledger.saw(one.id)
        if one.token_ids is None:
            ledger.count(one.fate, 1)
            ledger.count("bytes_read", one.size)
            ledger.tell()
            continue
        waiting.append(one)
        yield one.token_ids
