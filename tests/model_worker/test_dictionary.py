"""The dictionary study: distinct keys, questions about what is in memory, right scores, indexes against exact ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from memory_service import Engine, FotError, InvalidArgument
from model_worker.cli import evaluate_dictionary
from model_worker.evaluation import dictionary, dictionary_scores
from model_worker.evaluation.dictionary import best_index, contender, contenders_of
from model_worker.evaluation.dictionary_memory import BATCH_WINDOWS, Library, Player, library
from model_worker.evaluation.dictionary_scores import NOWHERE, Found
from model_worker.evaluation.dictionary_world import World
from model_worker.evaluation.place import Place
from model_worker.evaluation.report import Report
from model_worker.evaluation.wilson import Share
from model_worker.hf.longllama import FIELD, fot_json
from model_worker.settings import FotConfig, Recall
from model_worker.tasks import dictionary as task
from tests.model_worker.tiny import tiny_model

FOT = FotConfig(mem_layers=(1,), window=47, mem_positionals=False)
TINY = {"vocab_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16, "num_attention_heads": 2}
SIZES = (400, 4000)
ENGINES = ("faiss:IVF16,Flat?nprobe=16", "exact", "faiss:HNSW8", "faiss:IVF16,SQ8", "dense")


def player_of(fot: FotConfig = FOT, **changes: object) -> Player:
    return Player.of(tiny_model(**{**TINY, **changes}), fot, "tiny")


@pytest.fixture(scope="module")
def player() -> Player:
    return player_of()


@pytest.fixture(scope="module")
def report(player: Player) -> Report:
    return dictionary.run(
        player, sizes=SIZES, questions=12, engines=ENGINES, probes=(1, 4), top_k=8, document_tokens=900
    )


# --- The dictionary -------------------------------------------------------------------------------------------------


def test_every_definition_has_a_key_of_its_own_in_the_papers_form() -> None:
    rows = World(5000, 25, seed=3).definitions(0, 5000).view(-1, task.RECORD)
    assert rows[:, 0].unique().tolist() == [task.KEY] and rows[:, 5].unique().tolist() == [task.VALUE]
    assert len(rows[:, 1:5].unique(dim=0)) == 5000
    assert rows[:, 6:].min() >= task.FIRST_SYMBOL and rows[:, 6:].max() < task.VOCABULARY


def test_a_dictionary_of_a_seed_is_the_same_however_it_is_read() -> None:
    one, other = World(200, 4, seed=1), World(200, 4, seed=1)
    apart = torch.cat([other.definitions(first, 40) for first in range(0, 200, 40)])
    assert torch.equal(one.definitions(0, 200), apart)
    assert not torch.equal(one.definitions(0, 200), World(200, 4, seed=2).definitions(0, 200))
    assert torch.equal(one.questions(100, 8).ids, other.questions(100, 8).ids)


@pytest.mark.parametrize(("among", "count", "windows"), [(500, 10, 3), (500, 12, 3), (8, 30, 8)])
def test_questions_fill_windows_and_ask_what_is_defined(among: int, count: int, windows: int) -> None:
    world = World(500, 4, seed=5)
    questions = world.questions(among, count)
    assert (questions.ids.shape, questions.count) == ((windows, 40), 4 * windows)
    asked = questions.ids.view(windows, 4, task.RECORD)
    defined = world.definitions(0, 500).view(-1, task.RECORD)[torch.from_numpy(questions.records)]
    assert (asked[..., 0] == task.QUESTION).all() and torch.equal(asked[..., 1:], defined[..., 1:])
    assert questions.records.max() < among
    assert all(len(set(row)) == 4 for row in questions.records.tolist())


def test_every_definition_in_memory_may_be_asked() -> None:
    asked = World(64, 4, seed=1).questions(64, 64).records
    assert sorted(asked.ravel().tolist()) == list(range(64))


def test_a_question_knows_where_its_answer_stands() -> None:
    world = World(100, 4, seed=7)
    questions = world.questions(100, 12)
    everything = world.definitions(0, 100)
    stated = everything[torch.from_numpy(questions.defined())]
    assert torch.equal(stated, questions.wanted().flatten(1))
    assert torch.equal(questions.ids[:, questions.asking + 1], stated)


def test_more_definitions_than_keys_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="keys"):
        World(61**4 + 1, 25, seed=0)


def test_fewer_definitions_than_a_window_asks_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="do not fill"):
        World(100, 25, seed=0).questions(24, 1)


# --- Scores ---------------------------------------------------------------------------------------------------------


def test_one_wrong_token_costs_its_record() -> None:
    wanted = torch.arange(24).view(2, 3, 4)
    answers = wanted.clone()
    assert dictionary_scores.right(answers, wanted) == (Share(24, 24), Share(6, 6))
    answers[1, 2, 3] = 0
    assert dictionary_scores.right(answers, wanted) == (Share(23, 24), Share(5, 6))
    assert dictionary_scores.slots(answers, wanted) == pytest.approx([1, 1, 1, 5 / 6])
    assert dictionary_scores.right(wanted + 1, wanted) == (Share(0, 24), Share(0, 6))


def found_of(places: list[list[int]], scores: list[list[float]]) -> Found:
    """One window and head; a query a row."""
    return Found(np.array(places)[None, None], torch.tensor(scores)[None, None])


def test_recall_and_mass_are_shares_of_the_exact_top_k() -> None:
    exact = found_of([[3, 1], [7, 9]], [[2.0, 2.0], [1.0, -40.0]])
    index = found_of([[1, 4], [7, NOWHERE]], [[2.0, -60.0], [1.0, -torch.inf]])
    kept = dictionary_scores.kept(index, exact)
    assert kept.recall == 0.5
    assert kept.mass == pytest.approx((0.5 + 1) / 2)
    assert dictionary_scores.kept(exact, exact) == dictionary_scores.Kept(1.0, 1.0, 1.0)


def test_of_equal_keys_any_will_do() -> None:
    exact, index = found_of([[3, 1, 2]], [[2.0, 1.0, 1.0]]), found_of([[3, 8, 9]], [[2.0, 1.0 - 1e-7, 1.0]])
    assert dictionary_scores.kept(index, exact).recall == 1.0


def test_padding_is_not_a_key_that_was_found() -> None:
    exact = found_of([[3, NOWHERE]], [[2.0, -torch.inf]])
    assert dictionary_scores.kept(exact, exact).recall == 1.0
    assert dictionary_scores.kept(found_of([[NOWHERE] * 2], [[-torch.inf] * 2]), exact).recall == 0.0


def test_the_gap_is_how_far_the_definition_stands_out() -> None:
    found = found_of([[5, 6], [8, 7], [1, 2]], [[9.0, 4.0], [3.0, 2.5], [6.0, 5.0]])
    gap = dictionary_scores.gap(found, np.array([[5, 7, 99]]))
    assert gap.found == pytest.approx(2 / 3)
    assert gap.mean == pytest.approx((5.0 - 0.5 - 1.0) / 3)  # Of what was not found no more is known than the last.


# --- A model that knows ---------------------------------------------------------------------------------------------


class Knowing:
    """In place of a model: knows every definition, but not those of some keys."""

    def __init__(self, world: World, forgets: int = 0):
        rows = world.definitions(0, world.records).view(-1, task.RECORD)
        self._values = {tuple(row[1:5].tolist()): row[6:].tolist() for row in rows[forgets:]}

    def logits(self, ids: Tensor) -> Tensor:
        """[W, T, V]: certain of every value, of nothing else."""
        told = torch.zeros(*ids.shape, task.VOCABULARY)
        for window, text in enumerate(ids.tolist()):
            for first in range(0, len(text), task.RECORD):
                for place, token in enumerate(self._values.get(tuple(text[first + 1 : first + 5]), [])):
                    told[window, first + 5 + place, token] = 1.0
        return told


@pytest.mark.parametrize(("forgets", "tokens", "records"), [(0, 1.0, 1.0), (40, 0.6, 0.6)])
def test_a_model_that_knows_the_definitions_is_right(
    player: Player, monkeypatch: pytest.MonkeyPatch, forgets: int, tokens: float, records: float
) -> None:
    known = Knowing(World(100, player.in_window, seed=0), forgets)
    forward = type(player.base).forward

    def knowing(self: Any, input_ids: Tensor, *arguments: Any, **keywords: Any) -> Any:
        answer = forward(self, input_ids, *arguments, **keywords)
        answer.logits = known.logits(input_ids)
        return answer

    monkeypatch.setattr(type(player.base), "forward", knowing)
    (row,) = dictionary.run(player, sizes=(1000,), questions=100, engines=("exact",), greedy=True).rows
    assert (row["tokens_right"], row["records_right"]) == pytest.approx((tokens, records), abs=0.02)
    assert row["greedy_records_right"] == row["records_right"]


def test_an_untrained_model_is_not(report: Report) -> None:
    assert all(row["records_right"] == 0 and row["tokens_right"] < 0.2 for row in report.rows)


# --- The study ------------------------------------------------------------------------------------------------------


def test_every_engine_is_asked_at_every_size(report: Report) -> None:
    asked = [(row["size"], row["engine"], row["setting"]) for row in report.rows]
    settings = [
        ("exact", ""), ("dense", ""), ("faiss:IVF16,Flat", "nprobe 16"), ("faiss:HNSW8", "efSearch 64"),
        ("faiss:HNSW8", "efSearch 256"), ("faiss:IVF16,SQ8", "nprobe 1"), ("faiss:IVF16,SQ8", "nprobe 4"),
    ]  # fmt: skip
    assert asked == [(size, *setting) for size in SIZES for setting in settings]
    assert [row["tokens"] for row in report.rows[:: len(settings)]] == [400, 4000]
    assert all(row["asked"] == 12 for row in report.rows)
    assert all(row["search_s"] > 0 for row in report.rows)
    assert all(row["ms_per_question"] * row["asked"] >= 1000 * row["search_s"] for row in report.rows)


def test_the_study_says_how_far_it_is_while_it_builds_and_asks(player: Player) -> None:
    told: list[str] = []
    dictionary.run(
        player, sizes=(4000,), questions=40, engines=("exact", "faiss:IVF16,SQ8?nprobe=4"), top_k=4,
        tell=lambda done, total, words: told.append(words),
    )  # fmt: skip
    assert "4K: asking exact: 16 of 40 questions" in told
    assert told[-1] == "4K: asking faiss:IVF16,SQ8 nprobe 4: 40 of 40 questions"
    assert any(words.startswith("4K: building IVF16,SQ8") for words in told)


def test_the_memory_says_that_each_engine_answered(report: Report) -> None:
    by = {row["engine"]: row["answered_by"] for row in report.rows if row["size"] == SIZES[-1]}
    assert by == {
        "exact": "exact", "dense": "dense", "faiss:IVF16,Flat": "index:IVF16,Flat", "faiss:HNSW8": "index:HNSW8",
        "faiss:IVF16,SQ8": "index:IVF16,SQ8",
    }  # fmt: skip


def test_an_index_that_looks_everywhere_finds_what_exact_search_finds(report: Report) -> None:
    exact, _, whole, *_, few, more = [row for row in report.rows if row["size"] == SIZES[-1]]
    assert exact["recall"] == exact["captured_mass"] == 1.0
    assert whole["recall"] == 1.0 and whole["captured_mass"] == pytest.approx(1.0)
    assert whole["tokens_found"] == exact["tokens_found"]
    assert few["recall"] < more["recall"] < 1.0 and few["captured_mass"] < more["captured_mass"] < 1.0
    assert few["index_bytes"] > 0 and exact["index_bytes"] is None


@pytest.fixture(scope="module")
def shelf() -> Any:
    """A library of 100 definitions in three documents; its model is its own, since it stays attached."""
    player = player_of()
    world = World(100, player.in_window, seed=9)
    with Place().open(1 << 20) as client, library(player, client) as made:
        made.fill(world, 100, 440)
        yield made, world


def test_exact_search_of_every_key_answers_like_dense_attention(player: Player, shelf: tuple[Library, World]) -> None:
    made, world = shelf
    questions = world.questions(100, 20)
    assert len(questions.ids) > BATCH_WINDOWS  # Several batches are put together.
    dense = made.ask(questions, Recall())
    assert torch.equal(made.ask(questions, Recall(top_k=1000, engine=Engine.EXACT)).predicted, dense.predicted)
    assert dense.found is None
    # How a dictionary is cut into documents changes nothing, nor which windows are asked together.
    with Place().open(1 << 20) as client, library(player, client) as whole:
        whole.fill(world, 100, 1000)
        for number, window in enumerate(questions.ids):
            with whole.model.start(Recall()) as state:
                best = whole.model(window[None], past_key_values=state).logits.argmax(-1)
            assert torch.equal(dense.predicted[number].flatten(), best[0, questions.asking])


def test_what_was_found_are_places_in_the_dictionary(shelf: tuple[Library, World]) -> None:
    made, world = shelf
    questions = world.questions(100, 8)
    found = made.ask(questions, Recall(top_k=1000, engine=Engine.EXACT)).found
    assert found is not None
    assert found.places.shape == (2, 2, 16, 1000)
    assert sorted(found.places[1, 0, 3].tolist()) == list(range(1000))
    assert (found.scores.diff() <= 0).all()


def test_greedy_answers_are_those_of_decoding_token_by_token(shelf: tuple[Library, World]) -> None:
    made, world = shelf
    questions = world.questions(100, 8)
    recall = Recall(top_k=16, engine=Engine.EXACT)
    said = made.greedy(questions, recall, made.ask(questions, recall))
    ids = questions.ids.clone()
    for place in questions.asking.tolist():
        with made.model.start(recall) as state:
            ids[:, place + 1] = made.model(ids[:, : place + 1], past_key_values=state).logits[:, -1].argmax(-1)
    assert torch.equal(said, questions.answers_of(ids))


def test_documents_hold_whole_windows_and_lie_in_order(shelf: tuple[Library, World]) -> None:
    made, world = shelf
    stored = list(made.memory.documents())
    assert [one.tokens for one in stored] == [440, 440, 120]
    second = made.memory.fetch(stored[1].id, 1, 0, 440).token_ids
    assert torch.equal(second, world.definitions(44, 44))


def test_windows_are_cut_to_whole_records(player: Player) -> None:
    assert (player.fot.window, player.fot.last_context_length, player.in_window) == (40, 40, 4)
    wide = player_of(replace(FOT, window=2048), max_position_embeddings=2048)
    assert (wide.fot.window, wide.in_window) == (250, 25)


def test_a_dictionary_in_a_directory_is_read_from_ram_and_gone_afterwards(player: Player, tmp_path: Path) -> None:
    place = Place(str(tmp_path / "data"))
    report = dictionary.run(player, place, sizes=(800,), questions=4, engines=("exact", "faiss:SQ8"), top_k=4)
    assert [row["engine"] for row in report.rows] == ["exact", "faiss:SQ8"]
    assert report.rows[1]["recall"] > 0.9
    with place.open(1 << 20) as client:
        assert list(client.memories()) == []


# --- Engines as they are written ------------------------------------------------------------------------------------


def test_engines_are_read_from_text() -> None:
    one = contender("faiss:IVF64,SQ8?nprobe=4&candidates=64")
    assert one.name == "faiss:IVF64,SQ8"
    assert [(setting.factory, setting.search) for setting in one.settings] == [
        ("IVF64,SQ8", {"nprobe": 4, "candidates": 64})
    ]
    assert [setting.search for setting in contender("faiss:auto", (1, 9)).settings] == [{"nprobe": 1}, {"nprobe": 9}]
    assert [setting.search for setting in contender("faiss:SQ8").settings] == [{}]
    assert contender("dense").settings[0].top_k == 0


def test_an_index_that_is_named_twice_is_built_once() -> None:
    texts = ("faiss:IVF64,SQ8?nprobe=4", "exact", "faiss:IVF64,SQ8?nprobe=8", "faiss:SQ8", "exact")
    made = contenders_of(texts, (1,), 32, 16)
    assert [(one.name, len(one.settings)) for one in made] == [("exact", 1), ("faiss:IVF64,SQ8", 2), ("faiss:SQ8", 1)]


@pytest.mark.parametrize(
    "text",
    [
        "fast", "faiss", "faiss:", "faiss:none", "faiss:PQ7", "faiss:IVF64,SQ8?nprobe", "faiss:IVF64,SQ8?lists=3",
        "faiss:IVF64,SQ8?nprobe=0",
    ],
)  # fmt: skip
def test_engines_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        contender(text)


def test_what_would_not_fit_is_left_out_and_told(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "GRAPH_TOKENS", 500)
    free = iter([1 << 40, *[1 << 20] * 9])
    monkeypatch.setattr(dictionary, "free_bytes", lambda: next(free))
    rows = dictionary.run(
        player, sizes=(800,), questions=4, engines=("exact", "faiss:HNSW8", "faiss:SQ8", "faiss:auto"), top_k=4
    ).rows
    told = [row["refused"] for row in rows[1:]]
    assert told[0].startswith("a graph of more than")
    assert all(one.startswith("takes about") and one.endswith("1.0 MiB are free") for one in told[1:])
    assert len(told) == 3


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"sizes": ()}, "size"), ({"sizes": (39,)}, "window"), ({"questions": 0}, "question"), ({"top_k": 0}, "top_k"),
        ({"engines": ()}, "engine"), ({"probes": (0,)}, "probes"), ({"engines": ("quick",)}, "quick"),
        ({"sizes": (61**4 * 10 + 40,)}, "keys"),
    ],
)  # fmt: skip
def test_impossible_studies_are_refused_before_any_work(player: Player, wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        dictionary.run(player, **wrong)


def test_a_dictionary_larger_than_ram_is_refused(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "free_bytes", lambda: 1 << 20)
    with pytest.raises(InvalidArgument, match="RAM"):
        dictionary.run(player, sizes=(4000,))


def test_models_that_cannot_take_part_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no layer"):
        player_of(replace(FOT, mem_layers=()))
    with pytest.raises(InvalidArgument, match="knows 32 tokens"):
        player_of(vocab_size=32)
    with pytest.raises(InvalidArgument, match="window of 9"):
        player_of(replace(FOT, window=9))


# --- What is told ---------------------------------------------------------------------------------------------------


def test_the_quoted_index_is_the_fastest_that_is_as_right_as_exact_search() -> None:
    def row(engine: str, right: int, seconds: float) -> dict[str, Any]:
        return {"engine": engine, "records_found": right, "search_s": seconds}

    rows = [row("exact", 9, 8.0), row("faiss:a", 8, 1.0), row("faiss:b", 9, 3.0), row("faiss:c", 10, 2.0)]
    assert best_index(rows) == rows[3]
    assert best_index(rows[:3]) == rows[2]
    assert best_index(rows[:2]) == rows[1]  # None is: then the most accurate.
    assert best_index([rows[0], {**rows[1], "refused": "too large"}]) is None


def test_figures_are_named_by_size(report: Report) -> None:
    kinds = ("token", "record", "search_s")
    assert {f"{kind}_4k_{engine}" for kind in kinds for engine in ("exact", "index")} < set(report.figures)
    exact, best = report.rows[7], best_index(report.rows[7:])
    assert best is not None
    assert report.figures["index_vs_exact_time_4k"] == exact["search_s"] / best["search_s"]
    assert report.figures["token_400_exact"] == report.rows[0]["tokens_right"]


def test_the_report_is_json_that_says_how_it_was_done(report: Report) -> None:
    told = json.loads(report.to_json())
    assert told["protocol"].startswith("`fot eval dictionary`") and "2307.03170" in told["protocol"]
    assert told["settings"]["sizes"] == list(SIZES) and told["settings"]["query_heads"] == 2
    assert len(told["rows"]) == len(report.rows)


def fot(*arguments: object) -> Result:
    """Run `fot eval`; what it raises is in the result."""
    app = typer.Typer()
    app.callback()(lambda: None)
    evaluate_dictionary.register(app)
    return CliRunner().invoke(app, ["dictionary", *map(str, arguments)])


def test_the_command_prints_a_table_and_writes_json_and_two_plots(player: Player, tmp_path: Path) -> None:
    player.base.config.update({FIELD: fot_json(FOT)})
    player.base.save_pretrained(tmp_path / "model")
    files = [tmp_path / name for name in ("a.json", "b.png", "c.png")]
    done = fot(
        "--model", tmp_path / "model", "--sizes", "400,800", "--questions", 4, "--engine", "exact", "--engine",
        "faiss:IVF8,Flat?nprobe=8", "--top-k", 4, "--json", files[0], "--plot", files[1], "--plot-search", files[2],
    )  # fmt: skip
    assert done.exception is None, done.exception
    told = json.loads(files[0].read_text())
    assert told["study"] == "dictionary" and told["rows"][-1]["recall"] == 1.0
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])
    assert "faiss:IVF8,Flat" in done.stdout and "token_800_index" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere"), "no checkpoint"), (("--sizes", "many"), "--sizes"), (("--plot", "x.jpg"), ".png"),
        (("--plot-search", "x.jpg"), ".png"), (("--json", "nowhere/x.json"), "no directory"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_any_work(
    arguments: tuple[str, str], words: str, player: Player, tmp_path: Path
) -> None:
    player.base.save_pretrained(tmp_path / "model")
    done = fot(*(("--model", tmp_path / "model") if arguments[0] != "--model" else ()), *arguments)
    assert isinstance(done.exception, FotError) and words in done.exception.message
