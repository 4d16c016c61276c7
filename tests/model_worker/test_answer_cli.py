"""`fot ask`, `fot generate`, `fot attention`: answers with their sources, and a clear sentence for every mistake."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from memory_service import Memory
from model_worker.cli.opening import load_tokenizer
from model_worker.cli.sources import write_text
from model_worker.decoder.model import FotModel
from model_worker.ingestion.encoding import Encoder
from tests.command import Fot
from tests.memory_service.places import QUIET, serving
from tests.model_worker.tiny import save_tiny_llama

TEXTS = {f"room-{n}.md": f"The code of room {n} is {4711 * (n + 1)}. " * (n + 3) for n in range(3)}
QUESTION = "What is the code of room 1?"
SMALL = ("--window", 64, "--last-context", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="module")
def filled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with memory `notes` of three documents, and memory `empty` of none."""
    directory = tmp_path_factory.mktemp("filled") / "data"
    tokenizer = load_tokenizer(model)
    for name, texts in (("notes", TEXTS), ("empty", {})):
        with FotModel.from_pretrained(model, memory=directory, name=name, mem_layers=(1, 2)) as made:
            ids = [tokenizer(text)["input_ids"] for text in texts.values()]
            for (document, text), encoded in zip(texts.items(), Encoder(made).encode(ids), strict=True):
                assert made.memory is not None
                metadata = {"letters": len(text)}
                made.memory.put(document, encoded.keys, encoded.values, token_ids=encoded.token_ids, metadata=metadata)
    return directory


@pytest.fixture
def place(model: Path, filled: Path) -> tuple[object, ...]:
    """The options that name the model and its memory."""
    return ("--model", model, "--memory", filled, "--name", "notes", "--max-new-tokens", 5)


# --- Answers --------------------------------------------------------------------------------------------------------


def test_an_answer_comes_with_a_table_of_its_documents_and_passages(fot: Fot, place: tuple[object, ...]) -> None:
    done = fot("ask", QUESTION, *place, "--show-passages", 1, "--passage-tokens", 16)
    assert done.code == 0 and done.err == ""
    assert "mass document tokens text" in done.words
    for name, text in TEXTS.items():
        assert f"{name} {len(text) + 1}" in done.words
    quoted = re.findall(r"\d+–\d+ “(.*?)”", done.words)
    assert len(quoted) == 3 and all(any(words in text for text in TEXTS.values()) for words in quoted)
    assert "5 tokens in" in done.words and "to documents" in done.words
    assert "attended to the top 32 of" in done.words and "(exact)" in done.words


def test_an_answer_for_machines_has_everything(fot: Fot, place: tuple[object, ...]) -> None:
    told = fot("ask", QUESTION, *place, "--json").json
    assert told["question"] == QUESTION and told["memory"] == "notes" and len(told["token_ids"]) == 5
    sources = told["sources"]
    assert {source["document"] for source in sources["documents"]} == set(TEXTS)
    masses = [source["mass"] for source in sources["documents"]]
    assert sum(masses) + sources["window_mass"] == pytest.approx(1, abs=1e-4)
    assert sources["documents"][0]["passages"][0]["text"] in TEXTS[sources["documents"][0]["document"]]


def test_a_question_can_be_narrowed_to_documents(fot: Fot, place: tuple[object, ...]) -> None:
    def asked(*options: object) -> set[str]:
        told = fot("ask", "-", *place, "--json", *options, stdin=QUESTION).json
        return {source["document"] for source in told["sources"]["documents"]}

    longest = len(TEXTS["room-2.md"])
    assert asked("--document", "room-0.md", "-d", "room-2.md") == {"room-0.md", "room-2.md"}
    assert asked("--where", f"letters = {longest}") == {"room-2.md"}
    assert asked("-d", "room-0.md", "-d", "room-2.md", "--where", f"letters < {longest}") == {"room-0.md"}


def test_dense_attention_tells_documents_and_how_to_see_passages(fot: Fot, place: tuple[object, ...]) -> None:
    done = fot("ask", QUESTION, *place, "--top-k", 0)
    assert "room-1.md" in done.out and "“" not in done.out
    assert "(dense)" in done.out and "Passages are told with --top-k." in done.out


def test_an_answer_over_the_network_is_the_same(fot: Fot, model: Path, filled: Path) -> None:
    tail = ("--model", model, "--name", "notes", "--max-new-tokens", 3, "--json")
    here = fot("ask", QUESTION, "--memory", filled, *tail).json
    with serving(filled) as address:
        there = fot("ask", QUESTION, "--memory", address, *tail).json
    assert there["token_ids"] == here["token_ids"]
    for one, other in zip(there["sources"]["documents"], here["sources"]["documents"], strict=True):
        assert one["document"] == other["document"] and one["mass"] == pytest.approx(other["mass"], abs=1e-5)


# --- Long prompts ---------------------------------------------------------------------------------------------------


def test_a_long_prompt_goes_through_memory_without_any_place_for_it(fot: Fot, model: Path, tmp_path: Path) -> None:
    prompt = "".join(f"Line {number} of a long prompt. " for number in range(20))
    (tmp_path / "prompt.txt").write_text(prompt)
    options = ("--model", model, *SMALL, "--max-new-tokens", 4, "--top-k", 8, "--mem-layers", "1,2")
    plain = fot("generate", prompt, *options)
    assert plain.code == 0 and "mass" not in plain.out
    told = fot("generate", "--file", tmp_path / "prompt.txt", *options, "--sources")
    assert told.out.startswith(plain.out) and "(earlier in this text)" in told.out and "of a long" in told.out
    sources = fot("generate", "-", *options, "--json", "--sources", stdin=prompt).json["sources"]
    assert sources["documents"] == [] and sources["session_mass"] > 0 and len(sources["session"]) == 3


def test_a_prompt_can_see_documents_too_or_not(fot: Fot, place: tuple[object, ...]) -> None:
    seen = fot("generate", QUESTION, *place, "--sources", "--json").json["sources"]
    assert {source["document"] for source in seen["documents"]} == set(TEXTS)
    unseen = fot("generate", QUESTION, *place, "--sources", "--json", "--no-documents").json["sources"]
    assert unseen["documents"] == [] and unseen["window_mass"] == 1


def test_sampling_repeats_itself_with_a_seed(fot: Fot, place: tuple[object, ...]) -> None:
    texts = [fot("generate", QUESTION, *place, "--temperature", 1.5, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_letters_that_would_steer_a_terminal_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    write_text("a\x1b[2Jb\r\n\tc\x07")
    assert capsys.readouterr().out == "a�[2Jb�\n\tc�"


# --- Heat maps ------------------------------------------------------------------------------------------------------


def test_a_heat_map_is_drawn_as_picture_or_page(
    fot: Fot, model: Path, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = ("--model", model, "--memory", filled, "--name", "notes")
    done = fot("attention", QUESTION, *place, "--out", "heat.png")
    assert done.code == 0 and "Wrote heat.png; most went to room-" in done.words
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    fot("attention", QUESTION, *place, "-o", "heat.HTML", "--new-tokens", 3, "--show-documents", 2, "-d", "room-1.md")
    html = (tmp_path / "heat.HTML").read_text()
    assert "room-1.md" in html and "room-2.md" not in html and "3 of answer" in html


# --- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ask", " ", "-m", "{model}", "-t", "{filled}"), "the prompt is empty"),
        (("ask", QUESTION, "-m", "{filled}", "-t", "{filled}"), "is no checkpoint: it has no config.json"),
        (("ask", QUESTION, "-m", "{model}", "-t", "{filled}", "-n", "empty"), "has no documents yet; `fot ingest`"),
        (("ask", QUESTION, "-m", "{model}", "-t", "{filled}", "-n", "none"), "none"),
        (("ask", QUESTION, "-m", "{model}", "-t", "{filled}x"), "`fot ingest` makes a memory"),
        (("ask", QUESTION, *("-m", "{model}", "-t", "{filled}", "-n", "notes"), "-d", "lost"), "no document 'lost'"),
        (("ask", QUESTION, *("-m", "{model}", "-t", "{filled}", "-n", "notes"), "--where", "x = 1"), "matches --where"),
        (("ask", QUESTION, *("-m", "{model}", "-t", "{filled}", "-n", "notes"), "--template", "Q"), "{question}"),
        (("ask", QUESTION, "-m", "{other}", "-t", "{filled}", "-n", "notes"), "keys and values of"),
        (("ask", QUESTION, "-m", "{mute}", "-t", "{filled}", "-n", "notes"), "no tokenizer"),
        (("ask", QUESTION, "-m", "{model}", "-t", "{filled}", "--seed", "1"), "--temperature above 0"),
        (("ask", QUESTION, "-m", "{model}", "-t", "{filled}", "--engine", "best"), "'best' is not one of auto"),
        (("generate", "-m", "{model}"), "give the prompt"),
        (("generate", "a", "--file", "b", "-m", "{model}"), "give the prompt"),
        (("generate", "a", "-m", "{model}", "--where", "x = 1"), "need --memory"),
        (("generate", "a", "-m", "{model}", "--chat"), "no chat template"),
        (("generate", "--file", "{model}/model.safetensors", "-m", "{model}"), "is not UTF-8"),
        (("generate", "--file", "{model}/lost.txt", "-m", "{model}"), "No such file"),
        (("attention", "a", "-m", "{model}", "-t", "{filled}", "-o", "heat.gif"), "ends in .png or .html"),
        (("attention", "a", "-m", "{model}", "-t", "{filled}", "-o", "{filled}/x/heat.png"), "no directory"),
    ],
)
def test_every_mistake_is_told_in_one_sentence(
    fot: Fot, model: Path, filled: Path, others: dict[str, Path], arguments: tuple[str, ...], sentence: str
) -> None:
    places = {"model": model, "filled": filled, **others}
    for name, path in places.items():
        arguments = tuple(one.replace(f"{{{name}}}", str(path)) for one in arguments)
    done = fot(*arguments)
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("fot: ") and sentence in done.err and "defect" not in done.err


@pytest.fixture(scope="module")
def others(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with other weights, and one without a tokenizer."""
    directory = tmp_path_factory.mktemp("others")
    mute = shutil.copytree(model, directory / "mute")
    for path in mute.glob("*token*"):
        path.unlink()
    return {"other": save_tiny_llama(directory / "other", seed=1), "mute": mute}


def test_nothing_is_left_behind_in_the_memory(fot: Fot, place: tuple[object, ...], filled: Path) -> None:
    fot("ask", QUESTION, *place, *SMALL)
    with Memory.open(filled, "notes", options=QUIET) as memory:
        assert memory.stats().documents == 3 and memory.stats().sessions == 0
