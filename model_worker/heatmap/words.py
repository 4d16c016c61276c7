"""What heat maps say besides numbers: the model, the memory, the prompt, in words that fit."""

from __future__ import annotations

from model_worker.heatmap.colours import DOCUMENTS, SESSION, UNTOLD, WINDOW, percent
from model_worker.heatmap.grid import HeatMap, counted

NOTHING = "nothing in memory was attended to"
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def facts(heat: HeatMap) -> list[str]:
    """Who was asked what, in a few phrases."""
    info = heat.memory
    way = f"top {heat.top_k} keys" if heat.top_k else "all keys"
    found = [
        f"model {heat.model}",
        f"memory {info.name}: {counted(info.documents, 'document')}, {counted(info.tokens, 'token')}",
        f"memory layer{'s'[: len(heat.layers) != 1]} {', '.join(map(str, heat.layers)) or 'none'}",
        f"{way} ({heat.sources.engine})" if heat.sources.engine else "never asked",
    ]
    if heat.sources.coverage < 1:
        found.append(f"only {percent(heat.sources.coverage)} of the scope searched")
    return found


def readers(heat: HeatMap) -> str:
    """What the masses are a mean over."""
    answer = len(heat.token_texts) - heat.prompt_tokens
    told = f"mean over heads, memory layers and the {counted(len(heat.asked), 'token')} that asked"
    text = [f"{counted(heat.prompt_tokens, 'token')} of prompt"]
    if answer > 0:
        text.append(f"{answer:,} of answer")
    if heat.asked.start:
        text.append(f"the first {heat.asked.start:,} went to memory without asking")
    return f"{told} ({', '.join(text)})"


def passages_title(heat: HeatMap) -> str:
    """What the cells of the table by passage are."""
    cell = f"{heat.passage_tokens} tokens"
    if any(cell.place.tokens > heat.passage_tokens for row in heat.rows for cell in row.cells):
        cell += ", more in long ones"
    return f"each document from beginning to end, beside its length in tokens; a cell is {cell}"


def tokens_title(heat: HeatMap, together: int) -> str:
    """What the columns of the table by token say."""
    told = "what each asked for" if together == 1 else f"what they asked for; a column is {together} tokens"
    if not heat.top_k:
        told += "; dense answers tell documents for all tokens of a call together: only the memory's share differs"
    return told


def shares(heat: HeatMap) -> list[tuple[str, float, str]]:
    """How the whole attention divides: (name, mass, colour)."""
    sources = heat.sources
    documents = max(0.0, 1 - sources.window_mass - sources.session_mass - untold(heat))
    parts = [
        ("documents", documents, DOCUMENTS),
        ("earlier in this text", sources.session_mass, SESSION),
        ("window", sources.window_mass, WINDOW),
        ("not told", untold(heat), UNTOLD),
    ]
    return [part for part in parts if part[1] > 1e-6 or part[0] == "documents"]


def untold(heat: HeatMap) -> float:
    """Mass in memory that no row shows."""
    rows = sum(row.mass for row in heat.rows)
    return max(0.0, 1 - heat.sources.window_mass - rows)


def shortened(text: str, most: int) -> str:
    """At most `most` characters on one line; what is left out is in the middle."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    head = (most - 1) * 2 // 3
    return f"{line[:head]}…{line[-(most - 1 - head) :]}"


def visible(token: str) -> str:
    """A token's text with its spaces to be seen."""
    return "".join(_VISIBLE.get(letter, letter) for letter in token) or "∅"


def printable(text: str) -> str:
    """The text without letters that no page may hold."""
    return "".join(letter if letter >= " " or letter in "\n\t" else "▯" for letter in text)
