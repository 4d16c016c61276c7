"""A heat map as one HTML file that needs nothing else: the picture's tables, with the words of the best passages."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from model_worker.heatmap.colours import STOPS, UNKNOWN, grey, ink, percent, shade
from model_worker.heatmap.grid import HeatMap, Row
from model_worker.heatmap.words import (
    NOTHING,
    facts,
    passages_title,
    printable,
    readers,
    shares,
    shortened,
    tokens_title,
)
from model_worker.recall.tally import Floats

_MOST_COLUMNS = 240
_SEPARATE = 100  # More columns leave no room for lines between them.
_MOST_PROMPT = 240  # Letters in the heading.
_STYLE = f"""
:root {{ font: 15px/1.45 system-ui, sans-serif; color: #22242a; background: #fff; color-scheme: light; }}
body {{ max-width: 78rem; margin: 2rem auto; padding: 0 1.5rem; }}
h1 {{ font-size: 1.35rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .1rem; }}
p, .note {{ margin: .15rem 0; color: #5c6270; font-size: .87rem; }}
.split {{ display: flex; height: 1.3rem; margin: .8rem 0 .4rem; }}
.key span {{ margin-right: 1.6rem; font-size: .87rem; }}
.key i {{ display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; }}
table {{ border-collapse: separate; border-spacing: 0 3px; width: 100%; font-size: .85rem; }}
th {{ font-weight: normal; color: #5c6270; text-align: center; padding: 0 .3rem; }}
th.name {{ text-align: left; color: inherit; width: 24%; max-width: 18rem; overflow-wrap: anywhere; }}
td {{ padding: 0 0 0 .3rem; }}
td.number {{ text-align: right; padding-right: .6rem; width: 4rem; color: #5c6270; }}
td.mass {{ width: 4.2rem; }}
td.mass div {{ text-align: center; padding: .25rem 0; }}
.strip {{ display: flex; height: 1.7rem; background: {UNKNOWN}; }}
.strip div {{ box-shadow: inset -1px 0 #fff; min-width: 0; }}
.fine div {{ box-shadow: none; }}
.strip span {{ margin: auto; color: #5c6270; font-size: .78rem; }}
details {{ margin: 0 0 .4rem; font-size: .85rem; }}
summary {{ cursor: pointer; color: #5c6270; }}
blockquote {{ margin: .3rem 0 .3rem 1rem; padding-left: .7rem; border-left: 4px solid; overflow-wrap: anywhere; }}
blockquote small {{ color: #5c6270; display: block; }}
.text {{ line-height: 1.9; overflow-wrap: anywhere; white-space: pre-wrap; font-family: ui-monospace, monospace; }}
.text span {{ padding: .12rem 0; box-shadow: inset -1px 0 #fff; }}
.answer {{ border-left: 3px solid #22242a; margin-left: 2px; padding-left: 3px !important; }}
.scale {{ display: inline-block; width: 12rem; height: .8rem; vertical-align: middle; margin: 0 .5rem;
  background: linear-gradient(to right, {", ".join(STOPS)}); }}
"""


def save_page(heat: HeatMap, path: Path) -> None:
    """Write the file, UTF-8."""
    path.write_text(page(heat), encoding="utf-8")


def page(heat: HeatMap) -> str:
    """The whole page."""
    body = [
        f"<h1>“{_escape(shortened(heat.prompt, _MOST_PROMPT))}”</h1>",
        f"<p>{_escape(' · '.join(facts(heat)))}</p>",
        f"<p>Share of attention, {_escape(readers(heat))}</p>",
        *_split(heat),
        *(_passages(heat) if heat.rows else [f"<p>{_escape(NOTHING)}</p>"]),
        *(_tokens(heat) if heat.rows else []),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        # Documents may hold anything: even if some of it came through as markup, nothing of it would run or load.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Attention of {_escape(heat.model)}</title><style>{_STYLE}</style>"
    )
    lines = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{lines}\n</body></html>\n'


def _split(heat: HeatMap) -> Iterator[str]:
    yield '<div class="split">'
    for name, mass, colour in shares(heat):
        told = _escape(f"{percent(mass)} {name}")
        yield f'<div style="width:{100 * mass:.3f}%;background:{colour}" title="{told}"></div>'
    yield '</div><div class="key">'
    for name, mass, colour in shares(heat):
        yield f'<span><i style="background:{colour}"></i>{_escape(f"{percent(mass)} {name}")}</span>'
    yield "</div>"


def _scale(most: float) -> str:
    return f'0 %<span class="scale"></span>{percent(most)}'


def _passages(heat: HeatMap) -> Iterator[str]:
    most, most_of_a_row = heat.most_of_a_cell, heat.most_of_a_row
    scale = f" &nbsp; {_scale(most)}" if most else ""
    yield f'<h2>Passages</h2><div class="note">{_escape(passages_title(heat))}{scale}</div>'
    layers = [f"<th>layer {layer}</th>" for layer in heat.layers] if len(heat.layers) > 1 else []
    yield f'<table><tr><th class="name"></th><th></th><th></th><th>whole</th>{"".join(layers)}</tr>'
    for row in heat.rows:
        masses = [row.mass, *(map(float, row.by_layer) if layers else ())]
        yield (
            f'<tr><th class="name">{_escape(row.name)}</th>'
            f'<td class="number">{f"{row.tokens:,}" if row.tokens else ""}</td>'
            f'<td><div class="strip">{_strip(row, most)}</div></td>'
            f"{''.join(_mass(row, mass, most_of_a_row) for mass in masses)}</tr>"
        )
        if row.passages:
            yield f'<tr><td></td><td></td><td colspan="{2 + len(layers)}">{_words(row, most)}</td></tr>'
    yield "</table>"


def _strip(row: Row, most: float) -> str:
    if not row.cells:
        return f"<span>{'together' if row.documents > 1 else 'passages are told with a top k only'}</span>"
    return "".join(
        f'<div style="flex:{cell.place.tokens};background:{shade(cell.mass, most)}" '
        f'title="tokens {cell.place.first_token:,} to {cell.place.last_token:,}: {percent(cell.mass)}"></div>'
        for cell in row.cells
    )


def _mass(row: Row, mass: float, most: float) -> str:
    background, text = (grey(mass), "#22242a") if row.documents > 1 else (shade(mass, most), ink(mass, most))
    return f'<td class="mass"><div style="background:{background};color:{text}">{percent(mass)}</div></td>'


def _words(row: Row, most: float) -> str:
    quotes = []
    for one in row.passages:
        told = f"tokens {one.first_token:,} to {one.first_token + one.tokens - 1:,}, {percent(one.mass)}"
        text = _escape("no text stored" if one.text is None else one.text)
        edge = shade(one.mass, most)
        quotes.append(f'<blockquote style="border-color:{edge}"><small>{told}</small>{text}</blockquote>')
    return f"<details><summary>best passages</summary>{''.join(quotes)}</details>"


def _tokens(heat: HeatMap) -> Iterator[str]:
    together = max(1, -(-len(heat.asked) // _MOST_COLUMNS))
    asked = slice(heat.asked.start, heat.asked.stop)
    tables = [row.by_token[asked] for row in heat.rows]
    single = [table for table, row in zip(tables, heat.rows, strict=True) if row.documents < 2]
    most = float(np.nanmax(single)) if single else 0.0
    yield f'<h2>Tokens of the text</h2><div class="note">{_escape(tokens_title(heat, 1))} &nbsp; {_scale(most)}</div>'
    yield "<p>The text, by how much of it came from memory; point at a token for its documents.</p>"
    yield f'<div class="text">{"".join(_text(heat, tables))}</div>'
    yield "<table>"
    for row, table in zip(heat.rows, tables, strict=True):
        cells = "".join(_columns(heat, row, table, together, most))
        strip = "strip fine" if len(heat.asked) > _SEPARATE else "strip"
        yield f'<tr><th class="name">{_escape(row.name)}</th><td><div class="{strip}">{cells}</div></td></tr>'
    yield "</table>"


def _text(heat: HeatMap, tables: list[Floats]) -> Iterator[str]:
    if heat.asked.start:
        yield f'<span class="note">{heat.asked.start:,} tokens that did not ask … </span>'
    remembered = np.sum(tables, 0)
    most = float(np.nanmax(remembered))
    for number, token in enumerate(heat.asked):
        mass, begins = float(remembered[number]), token == heat.prompt_tokens
        style, told = f"background:{UNKNOWN}", "did not ask"
        if not np.isnan(mass):
            best = sorted(range(len(tables)), key=lambda row: -tables[row][number])[:3]
            told = ", ".join(f"{percent(float(tables[row][number]))} {heat.rows[row].name}" for row in best)
            style = f"background:{shade(mass, 4 * most)}"  # Light, to be read.
            told = f"token {token:,}: {percent(mass)} from memory; {told}"
        mark = ' class="answer"' if begins else ""
        yield f'<span{mark} style="{style}" title="{_escape(told)}">{_escape(heat.token_texts[token])}</span>'


def _columns(heat: HeatMap, row: Row, table: Floats, together: int, most: float) -> Iterator[str]:
    for first in range(0, len(table), together):
        values = table[first : first + together]
        known = values[~np.isnan(values)]
        mass = float(known.mean()) if len(known) else 0.0
        colour = grey(mass) if row.documents > 1 else shade(mass, most)
        start = heat.asked.start + first
        text = "".join(heat.token_texts[start : start + len(values)])
        told = f"token {start:,} “{text}”: {percent(mass) if len(known) else 'did not ask'}"
        mark = ' class="answer"' if start <= heat.prompt_tokens < start + len(values) else ""
        yield (
            f'<div{mark} style="flex:{len(values)};background:{colour if len(known) else UNKNOWN}" '
            f'title="{_escape(told)}"></div>'
        )


def _escape(text: str) -> str:
    """Text that stands for itself in a page."""
    return html.escape(printable(text))
