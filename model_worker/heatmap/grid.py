"""The numbers of a heat map: documents by passage, by memory layer and by token of the text that asked.

R rows, L memory layers, T tokens of the text, C cells of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from memory_service import Memory, MemoryInfo
from memory_service.errors import InvalidArgument
from model_worker.recall.passages import PASSAGE_TOKENS, Passage, passage_at, passage_count
from model_worker.recall.sources import PassageMass, Sources, Telling, listened, sources_of
from model_worker.recall.tally import UNTOLD, WINDOW, Floats, Tally, is_session
from model_worker.settings import Recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model_worker.decoder.model import FotModel


class Cell(NamedTuple):
    """Consecutive passages of a document that are drawn as one."""

    place: Passage
    mass: float


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A document, all other documents together, or what the text itself has put into memory."""

    name: str
    tokens: int  # Its length; 0 where that is not one number.
    mass: float  # Mean over layers, heads and tokens.
    by_layer: Floats  # [L]
    by_token: Floats  # [T], nan for tokens that did not ask
    cells: tuple[Cell, ...]  # From its first token to its last; empty where only the whole is known.
    passages: tuple[PassageMass, ...]  # The best, with their text.
    documents: int  # 1, more where it stands for many, 0 for the text's own past.


@dataclass(frozen=True, slots=True, eq=False)
class HeatMap:
    """Where the attention of a text went."""

    model: str
    memory: MemoryInfo
    layers: tuple[int, ...]
    top_k: int
    prompt: str
    prompt_tokens: int
    token_texts: tuple[str, ...]  # [T] of prompt and answer
    rows: tuple[Row, ...]  # Documents by mass, then all others as one, then the text's own past.
    sources: Sources
    passage_tokens: int
    asked: range  # The tokens that asked the memory; those before were loaded into it unread.

    @property
    def most_of_a_cell(self) -> float:
        """What the darkest cell stands for."""
        return max((cell.mass for row in self.rows for cell in row.cells), default=0.0)

    @property
    def most_of_a_row(self) -> float:
        """The largest mass in one layer of what is one thing: many documents together would outshine each."""
        single = [row for row in self.rows if row.documents < 2]
        return max((float(mass) for row in single for mass in (row.mass, *row.by_layer)), default=0.0)


def observe(
    model: FotModel, prompt: Sequence[int], recall: Recall, new_tokens: int = 0, passage_tokens: int = PASSAGE_TOKENS
) -> tuple[Tally, list[int]]:
    """Read a prompt, and go on for `new_tokens`; what was attended, token by token, and all token ids."""
    if new_tokens < 0:
        raise InvalidArgument(f"new_tokens must be ≥ 0, got {new_tokens}")
    if not prompt:
        raise InvalidArgument("the prompt has no tokens; there is nothing to look at")
    tally = Tally(passage_tokens, by_token=True)
    heard = listened(recall, tally)
    ids = torch.tensor([list(prompt)], device=model.device)
    if not new_tokens:
        with model.start(heard) as state:
            model(ids, past_key_values=state, logits_to_keep=1)
        return tally, list(prompt)
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, num_beams=1,
        return_dict_in_generate=False, recall=heard,
    )  # fmt: skip
    return tally, [int(token) for token in whole[0]]


def heat_map(
    tally: Tally,
    memory: Memory,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    *,
    model: str,
    prompt: str,
    prompt_tokens: int,
    top_k: int = 0,
    rows: int = 12,
    cells: int = 64,
    passages: int = 3,
) -> HeatMap:
    """Draw up what a tally by token holds: the `rows` documents with most mass, each in at most `cells` cells.

    `passages` of each are fetched to be read. Raises InvalidArgument unless the tally kept tokens apart.
    """
    if not tally.by_token:
        raise InvalidArgument("a heat map needs Tally(by_token=True)")
    if rows < 1 or cells < 1:
        raise InvalidArgument(f"a heat map needs ≥ 1 row and cell, got {rows} and {cells}")
    sources = sources_of(tally, memory, tokenizer, token_ids, Telling(rows, passages, tally.passage_tokens))
    drawing = _Drawing(tally, len(token_ids), cells)
    shown = [drawing.row(one.document, [one.document], one.tokens, one.passages) for one in sources.documents]
    if others := drawing.documents.difference(one.document for one in sources.documents):
        shown.append(drawing.row(counted(len(others), "more document"), sorted(others)))
    if drawing.sessions:
        shown.append(drawing.row("earlier in this text", drawing.sessions, len(token_ids), sources.session))
    return HeatMap(
        model=model,
        memory=memory.info(),
        layers=tally.layers,
        top_k=top_k,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        token_texts=tuple(str(tokenizer.decode([token])) for token in token_ids),
        rows=tuple(shown),
        sources=sources,
        passage_tokens=tally.passage_tokens,
        asked=drawing.asked,
    )


def counted(number: int, noun: str) -> str:
    """1 document, 2 documents."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


class _Drawing:
    """A tally cut into rows."""

    def __init__(self, tally: Tally, tokens: int, cells: int):
        self._masses = tally.masses()
        self._layers = [tally.masses(layer).by_source() for layer in tally.layers]
        self._passage_tokens = tally.passage_tokens
        self._tokens = tokens
        self._most_cells = cells
        # All that a token gave out: 1 for each layer and row that asked.
        self._given = self._by_token(np.ones(len(self._masses.mass), bool))
        self._shares = self._masses.by_source()
        self.sessions = [name for name in self._shares if is_session(name)]
        self.documents = set(self._shares).difference(self.sessions, (WINDOW, UNTOLD))

    @property
    def asked(self) -> range:
        asked = np.flatnonzero(self._given)
        return range(int(asked[0]), int(asked[-1]) + 1) if len(asked) else range(0)

    def row(self, name: str, sources: Sequence[str], tokens: int = 0, passages: tuple[PassageMass, ...] = ()) -> Row:
        """These sources together."""
        numbers = [self._masses.names.index(source) for source in sources]
        by_token = np.full(self._tokens, np.nan)
        np.divide(self._by_token(np.isin(self._masses.source, numbers)), self._given, by_token, where=self._given > 0)
        by_layer = np.array([sum(layer.get(source, 0.0) for source in sources) for layer in self._layers])
        mass = sum(self._shares[source] for source in sources)
        cells = self._cells(sources[0], tokens) if tokens and len(sources) == 1 else ()
        documents = len(self.documents.intersection(sources))
        return Row(name, tokens, mass, by_layer, by_token, cells, passages, documents)

    def _cells(self, source: str, length: int) -> tuple[Cell, ...]:
        """The passages of a source, as many together as it takes to be few."""
        told = self._masses.by_passage(source)
        if not told:
            return ()
        together = -(-passage_count(length, self._passage_tokens) // self._most_cells)
        size = self._passage_tokens * together
        sums = np.zeros(passage_count(length, size))
        # A document replaced by a shorter one since: what was beyond its end has no place.
        kept = [number for number in told if number // together < len(sums)]
        np.add.at(sums, [number // together for number in kept], [told[number] for number in kept])
        return tuple(Cell(passage_at(number, length, size), float(mass)) for number, mass in enumerate(sums))

    def _by_token(self, chosen: NDArray[np.bool_]) -> Floats:
        sums = np.bincount(self._masses.token[chosen], self._masses.mass[chosen], self._tokens)
        return sums[: self._tokens].astype(np.float64)
