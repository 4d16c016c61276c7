"""Sources: which documents and passages the attention of a text went to, drawn from a tally, with their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memory_service import Memory, NotFound
from memory_service.errors import InvalidArgument
from model_worker.recall.passages import PASSAGE_TOKENS, check_passage_tokens, passage_at, passage_text, text_of
from model_worker.recall.tally import UNTOLD, WINDOW, Masses, Tally, is_session
from model_worker.settings import Read, Recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Telling:
    """How much is told of the sources."""

    documents: int = 8  # 0: only how much went to memory, which costs nothing.
    passages: int = 3  # Of each document.
    passage_tokens: int = PASSAGE_TOKENS

    def __post_init__(self) -> None:
        check_passage_tokens(self.passage_tokens)
        if self.documents < 0 or self.passages < 0:
            told = f"{self.documents} and {self.passages}"
            raise InvalidArgument(f"documents and passages to tell of must be ≥ 0, got {told}")


TELLING = Telling()


@dataclass(frozen=True, slots=True)
class PassageMass:
    """Consecutive tokens of a source and the share of the attention they got."""

    first_token: int
    tokens: int
    mass: float
    text: str | None  # None: no text stored.


@dataclass(frozen=True, slots=True)
class SourceMass:
    """A document and the share of the attention it got."""

    document: str
    tokens: int  # Its length; 0 if it has been deleted since.
    mass: float
    passages: tuple[PassageMass, ...] = ()  # Those with most, best first; none with dense attention.


@dataclass(frozen=True, slots=True)
class Sources:
    """Where attention went, mean over memory layers, heads and tokens.

    `window_mass`, `session_mass`, `other_mass` and the masses of `documents` sum to 1.
    """

    documents: tuple[SourceMass, ...]  # Best first.
    window_mass: float  # To the newest tokens, which are not in memory yet.
    session_mass: float  # To what prompt and answer have put into memory.
    session: tuple[PassageMass, ...]  # The passages of that with most, best first.
    other_documents: int  # That got some, beyond `documents`.
    other_mass: float  # Theirs, and what the memory did not tell.
    coverage: float  # Share of the scope that was searched, at worst.
    searched_tokens: int
    engine: str  # Which engines answered; "" if memory was never asked.


def listened(recall: Recall, tally: Tally, sources: bool = True) -> Recall:
    """The same answers, told to `tally` too; with `sources`, passages where there is a top k, else the documents."""
    others = recall.on_read

    def on_read(read: Read) -> None:
        tally(read)
        if others is not None:
            others(read)

    heard = replace(recall, on_read=on_read)
    if not sources:
        return heard
    return replace(heard, tokens=True) if recall.top_k else replace(heard, attribution=True)


def sources_of(
    tally: Tally,
    memory: Memory | None,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    telling: Telling,
) -> Sources:
    """The sources with most mass; `token_ids` is the whole text of the row. Costs a fetch for each passage told."""
    masses = tally.masses()
    shares = masses.by_source()
    sessions = [name for name in shares if is_session(name)]
    documents = {name: mass for name, mass in shares.items() if name not in (WINDOW, UNTOLD, *sessions)}
    best = sorted(documents, key=lambda name: -documents[name])[: telling.documents]
    own: list[PassageMass] = []
    if len(sessions) == 1:  # What several sessions of beams hold has no one place in the text.
        for number, mass in _best(masses, sessions[0], telling):
            first, count = passage_at(number, len(token_ids), telling.passage_tokens)
            own.append(PassageMass(first, count, mass, text_of(tokenizer, token_ids[first : first + count])))
    coverage = tally.coverage
    return Sources(
        documents=tuple(_source(name, documents[name], masses, memory, tokenizer, telling) for name in best),
        window_mass=shares.get(WINDOW, 0.0) if masses.queries else 1.0,
        session_mass=sum(shares[name] for name in sessions),
        session=tuple(own),
        other_documents=len(documents) - len(best),
        other_mass=shares.get(UNTOLD, 0.0) + sum(mass for name, mass in documents.items() if name not in best),
        coverage=1.0 if coverage is None else coverage.fraction,
        searched_tokens=0 if coverage is None else coverage.searched,
        engine=", ".join(tally.engines),
    )


def _source(
    document: str,
    mass: float,
    masses: Masses,
    memory: Memory | None,
    tokenizer: PreTrainedTokenizerBase,
    telling: Telling,
) -> SourceMass:
    if memory is None:
        return SourceMass(document, 0, mass)
    length = _document_tokens(memory, document)
    found = []
    for number, share in _best(masses, document, telling):
        passage = passage_at(number, length, telling.passage_tokens)
        found.append(PassageMass(*passage, share, passage_text(memory, tokenizer, document, passage)))
    return SourceMass(document, length, mass, tuple(found))


def _best(masses: Masses, source: str, telling: Telling) -> list[tuple[int, float]]:
    ranked = sorted(masses.by_passage(source).items(), key=lambda item: -item[1])
    return ranked[: telling.passages]


def _document_tokens(memory: Memory, document: str) -> int:
    try:
        return memory.get(document).tokens
    except NotFound:
        return 0
