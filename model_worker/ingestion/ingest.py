"""A corpus into a memory: documents are tokenised, encoded and stored, each once; a second run goes on from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from memory_service import DocumentInfo, Memory, MemorySpec
from memory_service.types.conditions import Scalar
from model_worker.corpus import Notes, Source
from model_worker.decoder.fitting import check_spec
from model_worker.ingestion.encoding import Encoded, Encoder
from model_worker.ingestion.intake import Fate, IngestReport, Intake, Ledger, Verdict
from model_worker.ingestion.uploads import Outgoing, Uploads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encodes(Protocol):
    """What ingest asks of an `Encoder`."""

    @property
    def spec(self) -> MemorySpec: ...

    def encode(self, documents: Iterable[Sequence[int] | Tensor]) -> Iterator[Encoded]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What an ingest works with."""

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase | None
    memory: Memory


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

    def wanted() -> Iterator[Verdict]:
        for verdict in map(intake.decide, sources):
            ledger.took(verdict)
            if verdict.token_ids is not None:
                yield verdict
            else:
                ledger.tell()

    try:
        for verdict in store(wanted(), encoder, memory, ledger.stored):
            ledger.count("bytes_read", verdict.size)
            ledger.tell()
        if belongs is not None:
            ledger.prune(memory, belongs)
    finally:
        ledger.tell()
    return ledger.report()


def store(
    verdicts: Iterable[Verdict],
    encoder: Encodes,
    memory: Memory,
    stored: Callable[[Verdict], None],
    request: str | None = None,
) -> Iterator[Verdict]:
    """Encode and put documents; yields each that is on its way, `stored` hears from other threads of those that are.

    `request` names the run: what is put twice in one run, as after an answer was lost, is committed once.
    Raises what the encoder and `Memory.put` raise.
    """
    encoding: deque[Verdict] = deque()
    sent: dict[str, Verdict] = {}
    with Uploads(memory, lambda document: stored(sent.pop(document.id))) as uploads:

        def token_ids() -> Iterator[Tensor]:
            for verdict in verdicts:
                uploads.check()
                assert verdict.token_ids is not None
                encoding.append(verdict)
                yield verdict.token_ids

        for encoded in encoder.encode(token_ids()):
            one = encoding.popleft()
            sent[one.id] = one
            request_id = None if request is None else f"{request}-{one.digest}"
            keys, values, replaced = encoded.keys, encoded.values, one.fate is Fate.REPLACED
            uploads.put(Outgoing(one.id, keys, values, encoded.token_ids, one.metadata, replaced, request_id))
            yield one
