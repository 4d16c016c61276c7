"""The passkey job: the authors' prompts, one answer by every way into memory, numbers that add up, clear refusals."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from memory_service import Client
from memory_service.errors import InvalidArgument
from model_worker.cli.options import sizes_of
from model_worker.cli.passkey_progress import PasskeyProgress
from model_worker.decoder.fitting import spec_of
from model_worker.decoder.model import FotModel
from model_worker.evaluation import asking, passkey
from model_worker.evaluation.asking import Asking, MemoryAsker, Store
from model_worker.evaluation.memories import Watched, fresh_memory
from model_worker.evaluation.passkey import Plan, run, shares
from model_worker.evaluation.questions import DISTRACTOR_TOKENS, Wording
from model_worker.evaluation.trials import Asked, Question, bands_of, trials_of
from model_worker.settings import FotConfig, Recall
from model_worker.tasks.landmark import DESCRIPTION, FILLER
from model_worker.tasks.tokens import Tokenizer, tokens_of
from tests.command import Done, Fot
from tests.memory_service.places import serving
from tests.model_worker.tiny import byte_tokenizer, save_tiny_llama, tiny_model

WINDOW, LAST = 64, 96  # Of the tiny models; a question has 38 bytes.
FOT = FotConfig((2,), window=WINDOW, last_context_length=LAST)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokens_of(byte_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def question_of(tokenizer: Tokenizer, tokens: int = 1500, **plan: Any) -> Question:
    made = Plan((tokens,), 1, 1, **plan)
    return made.questions(tokenizer, 200).question(next(trials_of(made.lengths, 1, 0)))


@contextmanager
def asker(target: object = ":memory:", fot: FotConfig = FOT, seed: int = 0, **way: Any) -> Iterator[MemoryAsker]:
    with Client.open(str(target)) as client:
        yield MemoryAsker(tiny_model(seed=seed), fot, client, Asking(**way))


def answer(question: Question, target: object = ":memory:", **way: Any) -> Asked:
    with asker(target, **way) as made:
        return made.ask(question, lambda _: None)


class Reading:
    """Answers what a function makes of the prompt's text."""

    def __init__(self, tokenizer: Tokenizer, says: Callable[[str], str]):
        self._tokenizer, self._says = tokenizer, says

    def ask(self, question: Question, on_tokens: Callable[[int], None]) -> Asked:
        on_tokens(len(question.ids))
        said = self._says(self._tokenizer.decode(question.ids.tolist()))
        ids = tuple(self._tokenizer.encode(f" {said}")[: len(question.answer)])
        return Asked(ids, len(question.ids), prefill_s=0.5, index_s=0.0, answer_s=0.25, nbytes=100, mass=0.5)


def stated_key(text: str) -> str:
    """What a reader who finds the line says."""
    found = re.search(r"\nThe (.+) is (\d+)\. Remember it\. \2 is the \1\.\n", text)
    assert found is not None
    return found[2]


# --- The job --------------------------------------------------------------------------------------------------------


def test_who_reads_the_line_finds_every_key_and_who_guesses_none(tokenizer: Tokenizer) -> None:
    plan = Plan((600, 2000), trials=6, depths=3)
    questions = plan.questions(tokenizer, 200)
    right = run(plan, questions, Reading(tokenizer, stated_key))
    assert right.figures["accuracy"] == 1 and right.figures["trials"] == 12
    assert (right.figures["low"], right.figures["high"]) == (pytest.approx(0.7575, abs=1e-4), 1)
    wrong = run(plan, questions, Reading(tokenizer, lambda _: "00000"))
    assert wrong.figures["accuracy"] == 0 and {row["found"] for row in wrong.rows} == {0}
    assert {one["said"] for one in wrong.trials} <= {"0" * digits for digits in range(6)}


def test_rows_and_figures_add_up_to_the_trials(tokenizer: Tokenizer) -> None:
    def near(text: str) -> str:
        """Finds what stands in the haystack's last half."""
        begin, end = text.index("The grass"), text.index("\nWhat is")
        return stated_key(text) if text.index("\nThe pass key") > (begin + end) / 2 else "0"

    plan = Plan((1000, 700), trials=8, depths=4)
    report = run(plan, plan.questions(tokenizer, 200), Reading(tokenizer, near), settings={"model": "m"})
    assert [row["tokens"] for row in report.rows] == [700] * 5 + [1000] * 5
    assert [row["found"] for row in report.rows] == 2 * [0, 0, 2, 2, 4]
    assert [row["depth"] for row in report.rows][:5] == ["0–25 %", "25–50 %", "50–75 %", "75–100 %", "0–100 %"]
    assert {tokens: str(share) for tokens, share in shares(report).items()} == dict.fromkeys(
        (700, 1000), "50.0 % (21.5–78.5)"
    )
    figures, tokens = report.figures, [one["tokens"] for one in report.trials]
    assert figures["trials"] == len(report.trials) == 16 and figures["accuracy"] == 0.5
    assert figures["tokens"] == max(tokens) and abs(max(tokens) - 1000) <= 10
    assert figures["prefill_tokens_per_s"] == pytest.approx(sum(tokens) / (16 * 0.5), rel=1e-3)
    assert figures["seconds"] >= sum(one["seconds"] for one in report.trials)
    assert report.settings["model"] == "m" and report.settings["lengths"] == (1000, 700)
    assert "2307.03170" in json.loads(report.to_json())["protocol"]


def test_the_prompt_is_the_authors_and_its_answer_follows_it(tokenizer: Tokenizer) -> None:
    question = question_of(tokenizer, 3000)
    text = tokenizer.decode(question.ids.tolist())
    assert text.startswith(f"{DESCRIPTION}\n{FILLER} {FILLER}") and text.endswith(
        "\nWhat is the pass key? The pass key is"
    )
    assert abs(len(question.ids) - 3000) <= 64 and stated_key(text) == question.key
    line = tokenizer.decode(question.ids[question.line.start : question.line.stop].tolist())
    assert line.strip("\n") == f"The pass key is {question.key}. Remember it. {question.key} is the pass key."
    assert tokenizer.decode(question.answer) == f" {question.key}"


def test_depths_are_spread_evenly_and_the_same_for_the_same_seed(tokenizer: Tokenizer) -> None:
    trials = list(trials_of((500, 900), 10, seed=3))
    assert trials == list(trials_of((900, 500), 10, seed=3)) != list(trials_of((500, 900), 10, seed=4))
    for tokens in (500, 900):
        assert [int(10 * one.depth) for one in trials if one.tokens == tokens] == list(range(10))
    questions = Plan((900,), 10).questions(tokenizer, 200)
    asked = [questions.question(one) for one in trials[10:]]
    places = [one.line.start / len(one.ids) for one in asked]
    assert places == sorted(places) and len({one.key for one in asked}) == 10
    again = questions.question(trials[15])
    assert torch.equal(again.ids, asked[5].ids) and again.key == asked[5].key


def test_distractors_carry_other_labels_and_stand_beside_the_prompt(tokenizer: Tokenizer) -> None:
    question = question_of(tokenizer, 900, distractors=5, wording=Wording.LABELLED)
    assert question.label != "pass key" and {len(one) for one in question.others} == {DISTRACTOR_TOKENS}
    stated = [re.search(r"\nThe (.+) is \d+\. Remember", tokenizer.decode(one.tolist())) for one in question.others]
    labels = {found[1] for found in stated if found is not None}
    assert len(labels) == 5 and question.label not in labels
    alone = answer(replace(question, others=()), fot=replace(FOT, last_context_length=200))
    beside = answer(question, fot=replace(FOT, last_context_length=200))
    assert beside.tokens == alone.tokens + 5 * DISTRACTOR_TOKENS and beside.nbytes > alone.nbytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, "distinct, and at least one"),
        ({"lengths": (500, 500)}, "distinct"),
        ({"lengths": (0,)}, "1 to 1,073,741,824 tokens"),
        ({"trials": 0}, "trials and depths must be ≥ 1"),
        ({"trials": 4, "depths": 5}, "4 trials cannot show 5 depths"),
        ({"distractors": -1}, "distractors and seed must be ≥ 0"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Plan(**changes)


def test_prompts_that_cannot_be_are_refused_before_anything_is_asked(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="more than the 100 asked for"):
        Plan((100, 5000)).questions(tokenizer, 200)
    with pytest.raises(InvalidArgument, match="give --last-context 38 or more"):
        Plan((5000,)).questions(tokenizer, 37)


def test_bands_without_a_trial_are_told_as_such() -> None:
    assert bands_of([], 3) == []
    with pytest.raises(InvalidArgument, match="at least one stretch"):
        bands_of([], 0)


# --- Every way into memory -------------------------------------------------------------------------------------------


def test_the_answer_is_what_generate_says(tokenizer: Tokenizer) -> None:
    question = question_of(tokenizer)
    with (
        Client.open(":memory:") as client,
        fresh_memory(client, spec_of(tiny_model(), FOT), "test", Watched) as memory,
        FotModel(tiny_model(), FOT, memory) as model,
    ):
        whole = model.generate(
            question.ids[None], max_new_tokens=len(question.answer), do_sample=False, eos_token_id=None,
            recall=Recall(top_k=8), pad_token_id=2,
        )  # fmt: skip
    asked = answer(question, top_k=8)
    assert asked.ids == tuple(whole[0, len(question.ids) :].tolist())
    assert asked.tokens == len(question.ids) - LAST and asked.nbytes >= asked.tokens * 2 * 2 * 8 * 2


def test_sessions_documents_indexes_and_services_answer_alike(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PART", 5 * WINDOW)
    question = question_of(tokenizer, 1400)
    want = answer(question)
    with serving(None) as target:
        ways: list[tuple[object, dict[str, Any]]] = [
            (":memory:", {"store": Store.DOCUMENTS}),
            (tmp_path / "data", {}),
            (tmp_path / "data", {"store": Store.DOCUMENTS}),
            (target, {}),
            (target, {"store": Store.DOCUMENTS}),
            (":memory:", {"store": Store.DOCUMENTS, "engine": "index", "index": "Flat"}),
        ]
        for place, way in ways:
            have = answer(question, place, **way)
            assert have.ids == want.ids and have.tokens == want.tokens
            assert have.mass == pytest.approx(want.mass, abs=1e-3)
        with Client.open(target) as client:
            assert list(client.memories()) == []  # Nothing is left behind.
    with Client.open(str(tmp_path / "data")) as client:
        assert list(client.memories()) == []
    assert answer(question, top_k=0).mass is None


def test_an_index_is_built_over_the_documents_and_timed(tokenizer: Tokenizer) -> None:
    question = question_of(tokenizer)
    plain = answer(question, store=Store.DOCUMENTS)
    indexed = answer(question, store=Store.DOCUMENTS, engine="index", index="IVF4,Flat", search={"nprobe": 4})
    assert plain.index_s == 0 < indexed.index_s and indexed.nbytes > plain.nbytes and indexed.ids == plain.ids


def test_the_mass_on_the_key_is_what_its_tokens_got(tokenizer: Tokenizer) -> None:
    question = question_of(tokenizer)
    middle = len(question.ids) // 2
    parts = (range(middle), range(middle, len(question.ids)), range(len(question.ids)), range(0))
    masses = [answer(replace(question, line=line)).mass for line in parts]
    first, last, whole, none = (float(mass) for mass in masses if mass is not None)
    assert none == 0 < first < whole <= 1 and first + last == pytest.approx(whole, abs=1e-6)


def test_an_untrained_model_finds_nothing(tokenizer: Tokenizer) -> None:
    plan = Plan((500,), trials=8, depths=2)
    with asker() as made:
        report = run(plan, plan.questions(tokenizer, LAST), made)
    assert report.figures["accuracy"] < 0.2


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"engine": "index"}, "an index covers documents, not a session"),
        ({"engine": "index", "store": Store.DOCUMENTS, "top_k": 0}, "top_k"),
        ({"engine": "index", "store": Store.DOCUMENTS, "index": "none"}, "needs an index"),
        ({"engine": "faiss"}, "'faiss' is not one of auto, exact, index"),
    ],
)
def test_ways_that_cannot_be_are_refused(way: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Asking(**way)


def test_a_model_without_memory_layers_is_refused() -> None:
    with Client.open(":memory:") as client, pytest.raises(InvalidArgument, match="no memory layers"):
        MemoryAsker(tiny_model(), FotConfig(), client, Asking())


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fot(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `fot passkey` over the tiny model."""
    run = Fot(monkeypatch, capsys)

    def command(*arguments: object, fits: bool = True) -> Done:
        given = ["--mem-layers", 2, "--window", WINDOW, "--last-context", LAST] if fits else []
        return run("passkey", "--model", folder, *given, *arguments)

    return command


def test_the_command_tells_people_and_machines_the_same(fot: Callable[..., Done], tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "grid.png"
    arguments = ("--lengths", "600,1K", "--trials", 4, "--depths", 2, "--json", out, "--plot", picture)
    done = fot(*arguments, "--require", 0)
    told = json.loads(out.read_text())
    assert done.code == 0 and told["study"] == "passkey"
    assert {"accuracy", "low", "high", "trials", "tokens", "prefill_tokens_per_s", "seconds"} == set(told["figures"])
    assert [row["tokens"] for row in told["rows"]] == [600] * 3 + [1024] * 3 and len(told["trials"]) == 8
    assert told["settings"]["mem_layers"] == [2] and told["settings"]["engine"] == "exact"
    assert told["figures"]["prefill_tokens_per_s"] > 0
    for words in ("Passkeys found: ", "of 8", "1,024", "50–100 %", "all", "KiB", "accuracy"):
        assert words in done.out
    lines = done.err.splitlines()
    assert lines[0].startswith("trial 1/8, 600 tokens, depth ") and lines[7].startswith("trial 8/8, 1,024 tokens")
    assert lines[8] == f"wrote {picture}" and imread(picture).ndim == 3


def test_a_missed_requirement_is_an_exit_code_after_everything_is_written(
    fot: Callable[..., Done], tmp_path: Path
) -> None:
    done = fot("--tokens", 600, "--trials", 2, "--require", 0.99, "--json", tmp_path / "out.json")
    assert done.code == 1 and "Passkeys found" in done.out and (tmp_path / "out.json").exists()
    assert re.search(r"fot: found 0 of 2 keys in 600 tokens, an accuracy of 0: less than --require 0.99\n", done.err)


def test_json_on_standard_output_is_all_that_stands_there(fot: Callable[..., Done]) -> None:
    done = fot("--tokens", 600, "--trials", 1, "--json", "-", "--top-k", 0, "--distractors", 1)
    told = json.loads(done.out)
    assert told["settings"]["distractors"] == 1 and told["rows"][0]["key_mass"] is None


def test_an_index_through_a_service_in_one_command(fot: Callable[..., Done]) -> None:
    with serving(None) as target:
        done = fot(
            "--tokens", 900, "--trials", 1, "--memory", target, "--engine", "index", "--index", "Flat", "--json", "-"
        )
    assert done.code == 0 and json.loads(done.out)["settings"]["store"] == "documents"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--require", "1.5"], "--require is an accuracy from 0 to 1, got 1.5"),
        (["--tokens", "many"], "--tokens takes numbers of tokens such as 262144 or 256K, got 'many'"),
        (["--lengths", "1K,,2K"], "--lengths takes numbers"),
        (["--tokens", "120"], "more than the 120 asked for"),
        (["--trials", "3", "--depths", "4"], "at least as many trials as depths"),
        (["--engine", "faiss"], "'faiss' is not one of auto, exact, index"),
        (["--engine", "index", "--index", "IVF"], "index factory 'IVF' is not supported"),
        (["--engine", "index", "--search", "speed=2"], "speed"),
        (["--engine", "index", "--store", "session"], "an index covers documents"),
        (["--store", "shelf"], "--store is one of session, documents, got 'shelf'"),
        (["--question", "rude"], "--question is one of plain, labelled"),
        (["--filler", "hay"], "--filler is one of landmark, text, code, random"),
        (["--search", "nprobe"], "--search takes name=number"),
        (["--memory", "grpc://127.0.0.1:9"], "127.0.0.1:9"),
        (["--model", "absent"], "absent is no checkpoint"),
        (["--plot", "grid.jpg"], "grid.jpg must end in .png"),
        (["--json", "absent/out.json"], "there is no directory"),
        (["--last-context", "20"], "give --last-context 38 or more"),
        (["--mem-layers", "9"], "9"),
    ],
)
def test_mistakes_end_with_one_sentence_before_anything_is_asked(
    fot: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(passkey, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr("model_worker.cli.passkey_job.PATIENCE_S", 0.5)
    done = fot("--tokens", "2000", *arguments)
    assert (done.code, done.out) == (1, "")
    assert message in done.err and "defect" not in done.err and done.err.startswith("fot: ")


def test_a_model_or_a_tokenizer_that_is_missing_is_named(
    fot: Callable[..., Done], folder: Path, tmp_path: Path
) -> None:
    done = fot(fits=False)
    assert done.code == 1 and "does not say which of its layers have a memory" in done.err
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "has no tokenizer" in fot("--model", tmp_path).err


def test_sizes_are_written_in_full_or_with_a_letter() -> None:
    assert sizes_of("262144", "--tokens") == (262_144,)
    assert sizes_of("16k, 1M,10_000", "--lengths") == (16_384, 1_048_576, 10_000)
    for wrong in ("", "0", "-5", "1.5M", "K", "٣"):
        with pytest.raises(InvalidArgument, match="--tokens takes numbers"):
            sizes_of(wrong, "--tokens")


def test_progress_counts_tokens_and_says_what_went_wrong(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Watched:
        """Standard error as a terminal."""

        written = ""
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.written += text
            return len(text)

        def flush(self) -> None:
            pass

    screen = Watched()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    plan = Plan((600,), trials=2, depths=1)
    with PasskeyProgress(2, plan.tokens) as progress:
        run(plan, plan.questions(tokenizer, 200), Reading(tokenizer, lambda _: "0"), progress)
    assert "trial 2/2, 600 tokens, depth" in screen.written and "100%" in screen.written
    assert "0 of 2 found, 0.0 % (0.0–65.8)" in screen.written and ", not " in screen.written
