"""How an answer's sources are shown in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model_worker.cli.console import counted, say

if TYPE_CHECKING:
    from model_worker.answering.answers import Answer
    from model_worker.recall.sources import PassageMass, Sources

_WORDS = 100  # Letters of a passage in the table.
_UNWATCHED_COLUMNS = 1000


def write_text(piece: str) -> None:
    """A piece of an answer, at once, without letters that would steer the terminal."""
    sys.stdout.write("".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in piece))
    sys.stdout.flush()


def show_sources(answer: Answer, top_k: int) -> None:
    """A table of documents and passages, then a sentence on the rest."""
    sources = answer.sources
    if sources.documents or sources.session:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("mass", justify="right", no_wrap=True)
        table.add_column("document", overflow="fold")
        table.add_column("tokens", justify="right", no_wrap=True)
        table.add_column("text", overflow="fold")
        for row in _rows(sources):
            table.add_row(*map(escape, row))
        _show(table)
    for sentence in _sentences(answer, top_k):
        say(sentence)


def percent(mass: float) -> str:
    """12.3 %"""
    return f"{100 * mass:.1f} %" if mass >= 0.0005 or not mass else "<0.1 %"


def _rows(sources: Sources) -> Iterator[tuple[str, str, str, str]]:
    for one in sources.documents:
        yield percent(one.mass), one.document, f"{one.tokens:,}", ""
        yield from _passages(one.passages)
    if sources.other_documents:
        yield percent(sources.other_mass), f"{sources.other_documents:,} more", "", ""
    if sources.session_mass:
        yield percent(sources.session_mass), "(earlier in this text)", "", ""
        yield from _passages(sources.session)


def _passages(passages: Sequence[PassageMass]) -> Iterator[tuple[str, str, str, str]]:
    for one in passages:
        text = "(no text stored)" if one.text is None else f"“{_short(one.text)}”"
        yield percent(one.mass), "", f"{one.first_token:,}–{one.first_token + one.tokens - 1:,}", text


def _sentences(answer: Answer, top_k: int) -> Iterator[str]:
    sources = answer.sources
    speed = f"{counted(len(answer.token_ids), 'token')} in {answer.seconds:.1f} s"
    if not sources.engine:
        yield f"{speed}. The memory was never asked: all attention went to the window."
        return
    documents = max(0.0, 1 - sources.window_mass - sources.session_mass)
    parts = [(documents, "documents"), (sources.session_mass, "earlier parts of this text")]
    told = "".join(f"{percent(mass)} to {name}, " for mass, name in parts if mass > 1e-6)
    yield f"{speed}. Of the attention went {told}{percent(sources.window_mass)} to the window."
    keys = f"the top {top_k} of " if top_k else ""
    searched = f"Every token attended to {keys}{counted(sources.searched_tokens, 'token')} in memory ({sources.engine})"
    yield f"{searched}." if sources.coverage == 1 else f"{searched}, {percent(sources.coverage)} of the scope."
    if not top_k and sources.documents:
        yield "Passages are told with --top-k."


def _short(text: str) -> str:
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _WORDS else f"{line[: _WORDS - 1]}…"


def _show(table: Table) -> None:
    watched = sys.stdout.isatty() or "COLUMNS" in os.environ
    view = Console(soft_wrap=True, highlight=False, width=None if watched else _UNWATCHED_COLUMNS)
    with view.capture() as captured:
        view.print(table)
    # Rich fills the last column with spaces.
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
