"""`fot eval`: what each study's protocol promises, and that its report says what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import torch
from matplotlib.figure import Figure

from memory_service import AttendOptions, FailedPrecondition, InvalidArgument
from model_worker.evaluation import approximation, dense, distraction, lookup, needle, perplexity, ruler
from model_worker.evaluation.dense import captured_mass
from model_worker.evaluation.distraction import positive_mass
from model_worker.evaluation.haystacks import Cloze
from model_worker.evaluation.report import Report
from model_worker.evaluation.subject import Answer, Settings, Subject
from model_worker.settings import FotConfig, Recall
from model_worker.tasks.corpus import Kind, Split, Text
from model_worker.tasks.tokens import tokens_of
from tests.model_worker.texts import text
from tests.model_worker.tiny import save_tiny_llama

LAYER, WINDOW = 2, 192


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3)


@pytest.fixture
def subject(checkpoint: Path) -> Iterator[Subject]:
    with Subject.open(checkpoint, Settings(mem_layers=(LAYER,), window=WINDOW)) as opened:
        yield opened


def files(*names: str, size: int = 900) -> list[Text]:
    """Python files of which none is like another."""
    return [Text(name, Kind.CODE, f"# {name}\n" + "".join(f"x{i} = {name!r}\n" for i in range(size))) for name in names]


def named(package: str, split: Split, count: int = 1) -> list[str]:
    """Files of this package that training never sees, or does."""
    names = (f"library/{package}/module{number}.py" for number in range(1000))
    return [name for name in names if Text(name, Kind.CODE, "").split is split][:count]


def picture_of(report: Report, job: Any) -> Figure:
    """The report's picture, its JSON whole."""
    told = json.loads(report.to_json())
    assert told["study"] == report.study and told["rows"] and told["environment"]["versions"]["torch"]
    assert all(isinstance(value, float | int) for value in told["figures"].values())
    assert {column.key for column in job.COLUMNS} <= set().union(*told["rows"])
    drawn: Figure = job.picture(report)
    return drawn


# --- Look-up --------------------------------------------------------------------------------------------------------


class Clerk:
    """A library that answers every question, some of them wrong at the last token."""

    def __init__(self, wrong: int):
        self.tokens, self.encode_s = 0, 1.0
        self._wrong = wrong

    def put(self, texts: Mapping[str, Sequence[int]]) -> None:
        self.tokens += sum(map(len, texts.values()))

    def ask(self, questions: Sequence[Cloze]) -> list[Answer]:
        right = [(True,) * len(one.answer) for one in questions]
        return [Answer(one[:-1] + (number >= self._wrong,), ()) for number, one in enumerate(right)]


class Office:
    """A subject with such a library."""

    def __init__(self, checkpoint: Path, wrong: int):
        self.tokenizer = tokens_of(checkpoint)
        self.trained = FotConfig()
        self._wrong = wrong

    def told(self) -> dict[str, Any]:
        return {"model": "clerk"}

    @contextmanager
    def library(self) -> Iterator[Clerk]:
        yield Clerk(self._wrong)


@pytest.mark.parametrize(("wrong", "records", "tokens"), [(0, 1.0, 1.0), (4, 0.5, 1 - 0.5 / 36)])
def test_a_record_is_right_if_all_its_tokens_are(checkpoint: Path, wrong: int, records: float, tokens: float) -> None:
    office = cast(Subject, Office(checkpoint, wrong))
    report = lookup.run(office, lengths=(2000, 1000), questions=8)
    (row,) = [row for row in report.rows if row["length"] == 2000]
    assert row["asked"] == 8 and row["records_right"] == records and row["tokens_right"] == pytest.approx(tokens)
    assert row["low"] <= records <= row["high"]
    assert [row["length"] for row in report.rows] == [1000, 2000]
    assert report.figures["records_right_2000"] == records
    picture_of(report, lookup)


def test_an_untrained_model_finds_no_record(subject: Subject) -> None:
    report = lookup.run(subject, lengths=(900,), questions=4)
    assert report.figures["records_right_900"] == 0 and report.figures["tokens_right_900"] < 0.5
    assert report.rows[0]["tokens"] <= 900 and report.settings["model"] == "tiny"
    assert lookup.run(subject, lengths=(900,), questions=4).figures == report.figures


def test_a_lookup_without_questions_is_refused(subject: Subject) -> None:
    with pytest.raises(InvalidArgument, match="one question"):
        lookup.run(subject, questions=0)


# --- Distraction ----------------------------------------------------------------------------------------------------


def test_the_masses_on_all_documents_sum_to_one(subject: Subject) -> None:
    with subject.library() as library:
        library.put({f"d{number}": text(50 + number, seed=number) for number in range(4)})
        (answer,) = library.ask([Cloze([5, 6, 7], [8, 9])], recall=Recall(attribution=True))
        masses = [positive_mass(answer, f"d{number}") for number in range(4)]
    assert sum(masses) == pytest.approx(1, abs=1e-5) and all(0 < one < 1 for one in masses)
    assert positive_mass(answer, "elsewhere") == 0


def test_a_model_that_looks_at_all_alike_is_distracted_by_all_alike(subject: Subject) -> None:
    query: Any = subject.base.get_submodule(f"model.layers.{LAYER}.self_attn.q_proj")
    torch.nn.init.zeros_(query.weight)
    report = distraction.run([subject], documents=8, tokens=64, kinds=["text"], found=files("a.py", "b.py"))
    for row in report.rows:
        assert row["r_d"] == pytest.approx(1 / row["documents"], rel=1e-4) and row["uniform"] == 1 / row["documents"]


def test_one_document_gets_all_the_mass_and_models_are_compared(subject: Subject) -> None:
    report = distraction.run([subject, subject], documents=4, tokens=96, found=files("a.py", "b.py"))
    assert [row["documents"] for row in report.rows[:3]] == [1, 2, 4]
    assert all(row["r_d"] == pytest.approx(1) for row in report.rows if row["documents"] == 1)
    assert {(row["model"], row["kind"]) for row in report.rows} == {
        (name, kind) for name in ("tiny 1", "tiny 2") for kind in ("keys", "text")
    }
    assert report.figures["r_4_keys_tiny 1"] == report.figures["r_4_keys_tiny 2"]
    picture_of(report, distraction)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"documents": 6}, "power of two"), ({"kinds": ["none"]}, "keys, text"), ({"tokens": 20}, "more --tokens")],
)
def test_documents_that_cannot_be_made_are_refused(subject: Subject, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        distraction.run([subject], found=files("a.py"), **{"documents": 2, **options})


def test_too_little_text_is_said(subject: Subject) -> None:
    with pytest.raises(FailedPrecondition, match="fewer --documents"):
        distraction.run([subject], documents=64, found=files("a.py", size=50))


# --- Perplexity -----------------------------------------------------------------------------------------------------


PACKAGE = {Split.HELD_OUT: 1, Split.TRAIN: 3}  # Files of each.


def packages() -> list[Text]:
    names = (named(one, split, count) for one in ("one", "two") for split, count in PACKAGE.items())
    return files(*chain.from_iterable(names), size=120)


def test_without_files_nothing_is_gained_and_the_bits_are_the_plain_models(subject: Subject) -> None:
    report = perplexity.run(subject, most=2, pieces=4, file_tokens=300, found=packages())
    nothing = [row for row in report.rows if row["files"] == 0 and row["kind"] != "own"]
    assert [(row["gain"], row["low"], row["high"], row["tokens"]) for row in nothing] == [(0, 0, 0, 0)] * 2
    assert nothing[0]["bits"] == nothing[1]["bits"] == report.figures["bits_without_memory"]
    assert nothing[0]["perplexity"] == pytest.approx(2 ** nothing[0]["bits"])
    some = [row for row in report.rows if row["files"] == 2]
    assert len(some) == 3 and all(row["gain"] != 0 and row["low"] <= row["gain"] <= row["high"] for row in some)
    assert [row["files"] for row in report.rows] == [0, 1, 2] * 3
    picture_of(report, perplexity)


def test_a_window_is_predicted_over_its_kind_of_memory(subject: Subject) -> None:
    found = {one.name: one for one in packages()}
    targets, documents = perplexity._targets(subject, found, 2, 4, 300, Random(0))
    assert [target.file for target in targets] == [*named("one", Split.HELD_OUT) * 2, *named("two", Split.HELD_OUT) * 2]
    for target in targets:
        package = target.file.split("/")[1]
        assert all(f"/{package}/" in name and name != target.file for name in target.package)
        assert all(f"/{package}/" not in name for name in target.unrelated) and len(target.unrelated) == 2
        whole = subject.tokenizer.encode(found[target.file].text)
        past = list(documents[target.own])
        start = int(target.own.split()[-1])
        assert whole[start - len(past) : start] == past and whole[start : start + WINDOW] == list(target.ids)
        assert target.memory("own", 1) == (target.own, target.unrelated[0])
        assert target.memory("package", 2) == tuple(target.package)


def test_a_machine_without_held_out_files_is_told(subject: Subject) -> None:
    with pytest.raises(FailedPrecondition, match="smaller --most"):
        perplexity.run(subject, most=9, found=packages())


# --- Dense against top-k --------------------------------------------------------------------------------------------


def test_a_k_that_covers_everything_is_dense_attention(subject: Subject) -> None:
    report = dense.run(subject, haystacks=["lookup"], lengths=[600], top_k=[1, 16, 600], questions=3)
    by_k = {row["top_k"]: row for row in report.rows}
    assert by_k[600]["captured_mass"] == pytest.approx(1, abs=1e-5) and by_k[0]["captured_mass"] == 1
    assert 0 < by_k[1]["captured_mass"] < by_k[16]["captured_mass"] < 1
    assert by_k[600]["tokens_right"] == by_k[0]["tokens_right"]
    assert report.settings["engine"] == "exact" and "right_lookup_dense_600" in report.figures
    picture_of(report, dense)


def test_captured_mass_is_the_share_of_the_softmax(subject: Subject) -> None:
    with subject.library() as library:
        library.put({"only": text(40)})
        asked = library.queries([Cloze([7, 8, 9], [10])])
        keys = library.memory.fetch("only", LAYER, 0, 40).keys.float()  # [K, T, D]
        scores = torch.einsum("hqd,htd->hqt", asked[0].queries, keys.repeat_interleave(2, 0)) * asked[0].scale
        expected = scores.softmax(-1).topk(4).values.sum(-1).mean()
        assert captured_mass(library, asked, 4) == pytest.approx(float(expected), abs=1e-4)


def test_unknown_haystacks_and_empty_ks_are_refused(subject: Subject) -> None:
    with pytest.raises(InvalidArgument, match="keys, lookup"):
        dense.run(subject, haystacks=["hay"])
    with pytest.raises(InvalidArgument, match="at least 1"):
        dense.run(subject, top_k=[0])


# --- Approximation --------------------------------------------------------------------------------------------------


def test_indexes_are_measured_against_the_exact_search_and_refusals_are_reported(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximation, "TIMED", 2)
    report = approximation.run(
        subject, haystacks=["keys"], tokens=1500, questions=3, top_k=8, probes=[1, 128],
        factories=["Flat", "IVF{lists},Flat", "RaBitQ"],
    )  # fmt: skip
    rows = {(row["index"], row.get("setting")): row for row in report.rows}
    exact, flat = rows["none (exact)", "exact"], rows["Flat", "all codes"]
    # Bit-identical keys of the repeated filler tie, so which of them are found may differ, but not their mass.
    assert exact["recall"] == 1 and flat["recall"] > 0.9 and flat["captured_mass"] == pytest.approx(1)
    assert flat["right"] == exact["right"] and exact["bytes"] == 0 < flat["bytes"]
    one, every = rows["IVF128,Flat", "nprobe 1"], rows["IVF128,Flat", "nprobe 128"]
    assert one["recall"] < every["recall"] and one["captured_mass"] < every["captured_mass"]
    assert every["ms"] > 0 and every["ms_exact"] > 0 and math.isnan(exact["ms_exact"])
    assert "not supported" in rows["RaBitQ", None]["refused"]
    assert report.figures["right_at_99_mass_keys"] == exact["right"]
    picture_of(report, approximation)


def test_an_index_is_asked_through_the_model_too(subject: Subject) -> None:
    with subject.library("IVF16,Flat") as library:
        library.put({"only": text(1200)})
        library.index()
        search = {"nprobe": 1}
        answers = library.ask([Cloze([7, 8, 9], [10])], recall=Recall(top_k=4, engine="index", search=search))
        (found,) = library.attend(
            library.queries([Cloze([7, 8, 9], [10])]), AttendOptions(top_k=4, engine="index", search=search)
        )
    read = answers[0].reads[0].attended
    assert read.engine == "index:IVF16,Flat"
    torch.testing.assert_close(read.lse, found.lse, atol=1e-4, rtol=1e-4)


# --- RULER and needles ----------------------------------------------------------------------------------------------


def test_every_task_of_ruler_is_asked_and_an_untrained_model_scores_nothing(subject: Subject) -> None:
    report = ruler.run(subject, lengths=[1500], samples=1, tasks=["niah_single", "niah_multivalue", "vt"])
    assert [row["task"] for row in report.rows] == ["niah_single", "niah_multivalue", "vt"]
    assert report.figures["score_1500"] == 0 == report.figures["score_vt_1500"]
    assert [len(row["said"][0]["answers"]) for row in report.rows] == [1, 4, 5]
    assert all(row["said"][0]["output"] for row in report.rows)
    picture_of(report, ruler)


def test_ruler_scores_what_the_model_says(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(_: Any, __: Any, one: Any, *___: Any) -> str:
        return " and ".join(one.answers[:2]).upper()

    monkeypatch.setattr(ruler, "_output", say)
    report = ruler.run(subject, lengths=[1500], samples=2, tasks=["niah_single", "niah_multivalue"])
    assert [row["score"] for row in report.rows] == [1, 0.5] and [row["whole"] for row in report.rows] == [1, 0]
    assert report.figures["score_1500"] == 0.75


def test_unknown_tasks_are_refused(subject: Subject) -> None:
    with pytest.raises(InvalidArgument, match="niah_single"):
        ruler.run(subject, tasks=["needle"])


def test_needles_are_hidden_in_every_filler(subject: Subject) -> None:
    report = needle.run(subject, fillers=["landmark", "random"], lengths=[700], trials=2, depths=2)
    assert [(row["filler"], row["trials"]) for row in report.rows] == [("landmark", 2), ("random", 2)]
    assert [band["depth"] for band in report.rows[0]["depths"]] == ["0–50 %", "50–100 %"]
    assert report.figures["accuracy"] == 0 and report.figures["trials"] == 4
    picture_of(report, needle)
    with pytest.raises(InvalidArgument, match="landmark, text, code, random"):
        needle.run(subject, fillers=["hay"])
