"""Heat maps add up, stay readable with few and many documents, and no document's text can act on a page."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from memory_service import DType, Memory
from memory_service.errors import InvalidArgument
from model_worker.decoder.model import FotModel, spec_of
from model_worker.heatmap.colours import grey, ink, percent, shade
from model_worker.heatmap.grid import HeatMap, heat_map, observe
from model_worker.heatmap.page import page
from model_worker.heatmap.picture import Columns, picture, save_picture
from model_worker.heatmap.words import facts, readers, shares, shortened, visible
from model_worker.recall.tally import Tally
from model_worker.settings import FotConfig, Recall
from tests.model_worker.tiny import byte_tokenizer, tiny_model

FOT = FotConfig(mem_layers=(1, 2), window=48, last_context_length=24, mem_dtype=DType.F32)
LENGTHS = (30, 3, 100)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@contextmanager
def remembering(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]
) -> Iterator[tuple[FotModel, Memory]]:
    """A model whose memory holds these texts under random keys."""
    dice = torch.Generator().manual_seed(3)
    with Memory.open(":memory:", "notes", spec_of(base, FOT)) as memory, FotModel(base, FOT, memory) as model:
        for name, text in texts.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            keys = torch.randn(2, 2, len(ids), 8, generator=dice)
            memory.put(name, keys, keys, token_ids=ids)
        yield model, memory


def drawn(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: dict[str, str],
    prompt: str = "What is it?",
    *,
    top_k: int = 16,
    new_tokens: int = 0,
    rows: int = 12,
    cells: int = 64,
) -> HeatMap:
    with remembering(base, tokenizer, texts) as (model, memory):
        ids = tokenizer(prompt)["input_ids"]
        tally, whole = observe(model, ids, Recall(top_k=top_k), new_tokens, passage_tokens=8)
        return heat_map(
            tally,
            memory,
            tokenizer,
            whole,
            model="tiny",
            prompt=prompt,
            prompt_tokens=len(ids),
            top_k=top_k,
            rows=rows,
            cells=cells,
        )


def few() -> dict[str, str]:
    return {f"doc-{number}": "x" * length for number, length in enumerate(LENGTHS)}


def many(count: int) -> dict[str, str]:
    return {f"doc-{number:03}": "many words " * (1 + number % 3) for number in range(count)}


# --- Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 16])
def test_rows_and_window_are_all_the_attention_there_is(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, top_k: int
) -> None:
    heat = drawn(base, tokenizer, few(), "What is it? " * 5, top_k=top_k, new_tokens=6)
    assert [row.name for row in heat.rows][-1] == "earlier in this text" and len(heat.rows) == 4
    assert sum(row.mass for row in heat.rows) + heat.sources.window_mass == pytest.approx(1, abs=1e-5)
    assert sum(mass for _, mass, _ in shares(heat)) == pytest.approx(1, abs=1e-5)
    for row in heat.rows:
        assert np.mean(row.by_layer) == pytest.approx(row.mass)
        assert np.nanmean(row.by_token) == pytest.approx(row.mass)
        assert len(row.by_token) == len(heat.token_texts) == heat.prompt_tokens + 6
        assert sum(cell.mass for cell in row.cells) == pytest.approx(row.mass if top_k else 0)


def test_tokens_that_went_to_memory_unread_are_not_drawn_as_zero(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    heat = drawn(base, tokenizer, few(), "What is it? " * 5, new_tokens=3)
    # 61 tokens of prompt, of which 24 stay in the window; the last of the answer is read by nobody.
    assert heat.asked == range(61 - 24, 61 + 2)
    known = ~np.isnan(heat.rows[0].by_token)
    assert np.flatnonzero(known).tolist() == list(heat.asked)
    assert "the first 37 went to memory without asking" in readers(heat)


def test_cells_cover_a_document_from_end_to_end(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    heat = drawn(base, tokenizer, few(), cells=5)
    for row in heat.rows:
        places = [cell.place for cell in row.cells]
        assert len(places) <= 5 and sum(place.tokens for place in places) == row.tokens
        starts = np.cumsum([0, *(place.tokens for place in places)]).tolist()
        assert [place.first_token for place in places] == starts[:-1]
    (longest,) = [row for row in heat.rows if row.name == "doc-2"]
    assert [cell.place.tokens for cell in longest.cells] == [24, 24, 24, 24, 4]


def test_many_documents_are_drawn_as_the_best_and_the_rest(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    heat = drawn(base, tokenizer, many(300), rows=5, top_k=200)
    got = heat.sources.other_documents + 5
    assert [row.documents for row in heat.rows] == [1, 1, 1, 1, 1, got - 5]
    assert heat.rows[-1].name == f"{got - 5} more documents" and got > 100
    assert sum(row.mass for row in heat.rows) + heat.sources.window_mass == pytest.approx(1, abs=1e-5)
    # The rest together would outshine each of the best.
    assert heat.rows[-1].mass > heat.most_of_a_row == max(float(m) for r in heat.rows[:-1] for m in r.by_layer)


def test_observing_needs_a_prompt_and_a_tally_by_token(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with remembering(base, tokenizer, few()) as (model, memory):
        with pytest.raises(InvalidArgument, match="no tokens"):
            observe(model, [], Recall())
        with pytest.raises(InvalidArgument, match="new_tokens"):
            observe(model, [1], Recall(), -1)
        with pytest.raises(InvalidArgument, match="by_token"):
            heat_map(Tally(), memory, tokenizer, [1], model="", prompt="", prompt_tokens=1)
        with pytest.raises(InvalidArgument, match="row"):
            heat_map(Tally(by_token=True), memory, tokenizer, [1], model="", prompt="", prompt_tokens=1, rows=0)
        assert memory.stats().sessions == 0


# --- Pictures -------------------------------------------------------------------------------------------------------


def test_a_picture_is_as_tall_as_its_rows_need(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = {}
    for name, texts in (("none", {}), ("few", few()), ("many", many(40))):
        save_picture(drawn(base, tokenizer, texts), tmp_path / f"{name}.png", dpi=50)
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        sizes[name] = struct.unpack(">II", data[16:24])
    assert {width for width, _ in sizes.values()} == {650}
    assert sizes["none"][1] < sizes["few"][1] < sizes["many"][1] < 700


@pytest.mark.parametrize("top_k", [0, 16])
def test_a_picture_says_what_it_shows(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, top_k: int) -> None:
    # Neither formulas, nor letters the font lacks, nor a long name may break it: warnings are errors here.
    texts = {"cost_$5_and_$6.md": "money " * 9, "漢字/" + "long" * 40: "words " * 30, "\N{FOX FACE}": "fox"}
    heat = drawn(base, tokenizer, texts, "Is $x_1$ = 漢字?\n", top_k=top_k, new_tokens=4)
    figure = picture(heat)
    figure.canvas.draw()
    words = [text.get_text() for axes in figure.axes for text in axes.texts] + [
        text.get_text() for text in figure.texts
    ]
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert r"“Is \$x_1\$ = ▯▯?”" in words
    assert any("memory notes: 3 documents" in text and "model tiny" in text for text in words)
    assert any(label.startswith(r"cost_\$5_and_\$6.md") for label in labels)
    assert all(len(label) < 50 for label in labels)
    assert "answer ▸" in words and "share of attention" in words
    assert any("not passages" in text for text in words) == (not top_k)


def test_columns_hold_several_tokens_where_there_are_many(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    heat = drawn(base, tokenizer, few())
    columns = Columns.of(heat)
    assert columns.together == 1 and columns.names[:3] == ("<s>", "W", "h")
    assert columns.means(heat.rows[0].by_token) == pytest.approx(heat.rows[0].by_token)
    several = Columns(range(2, 7), 2, ())
    assert several.edges == [2, 4, 6, 7]
    means = several.means(np.array([9, 9, 1, 3, np.nan, 5, np.nan, 9]))
    assert means == pytest.approx([2, 5, np.nan], nan_ok=True)


# --- Pages ----------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a browser would make of a page."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("top_k", [0, 16])
def test_a_page_needs_nothing_else_and_nothing_in_it_runs(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, top_k: int
) -> None:
    evil = "</div><script>alert(1)</script><img src=x onerror=alert(2)>"
    heat = drawn(base, tokenizer, {f'"><script>{evil}': evil * 2}, f"{evil}\x0b\x00", top_k=top_k, new_tokens=2)
    found = Reader(html := page(heat))
    assert found.open == []
    assert not {"script", "img", "link", "iframe", "object"} & set(found.tags)
    assert found.attributes <= {
        "lang", "charset", "name", "content", "http-equiv", "style", "title", "class", "colspan"
    }  # fmt: skip
    assert evil in found.text and "default-src 'none'" in html
    assert not re.search(r"https?://|url\(|@import", html) and "\x00" not in html and "\x0b" not in html


def test_a_page_shows_the_words_of_the_best_passages(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = {"guide.md": "Open at nine & not after"}
    found = Reader(page(drawn(base, tokenizer, texts, "When?" * 12, new_tokens=3)))
    assert "guide.md" in found.text and "earlier in this text" in found.text
    assert "nine & n" in found.text and "tokens 8 to 15" in found.text
    empty = Reader(page(drawn(base, tokenizer, {})))
    assert "nothing in memory was attended to" in empty.text and empty.open == []


# --- Words and colours ----------------------------------------------------------------------------------------------


def test_numbers_and_words_fit_their_place(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert [percent(mass) for mass in (0, 1e-6, 0.0004, 0.0123, 0.5, 0.99999, 1)] == [
        "0 %", "<0.01 %", "0.04 %", "1.2 %", "50.0 %", "100 %", "100 %"
    ]  # fmt: skip
    assert shortened("a  b\nc", 9) == "a b c"
    assert shortened("abcdefghij", 7) == "abcd…ij"
    assert (visible(" a\n"), visible("")) == ("␣a⏎", "∅")
    heat = drawn(base, tokenizer, few())
    assert facts(heat) == [
        "model tiny", "memory notes: 3 documents, 133 tokens", "memory layers 1, 2", "top 16 keys (exact)"
    ]  # fmt: skip


def test_more_mass_is_darker_and_can_be_written_on() -> None:
    def light(colour: str) -> int:
        return sum(int(colour[at : at + 2], 16) for at in (1, 3, 5))

    steps = [shade(mass / 20, 1.0) for mass in range(21)]
    assert sorted(steps, key=light, reverse=True) == steps and len(set(steps)) == 21
    assert shade(0, 0) == steps[0] and shade(7, 1) == steps[-1] and light(grey(0)) > light(grey(1))
    assert (ink(0, 1), ink(1, 1)) == ("#22242a", "#ffffff")
