"""`fot eval …`: every study from the command line, its table, JSON and plot, and a clear sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from memory_service import FotError
from model_worker.cli import evaluate
from tests.model_worker.tiny import save_tiny_llama

STUDIES = ("needle", "lookup", "distraction", "ruler", "perplexity", "dense", "approximation")
QUICK = {
    "needle": ("--lengths", "700", "--trials", 1, "--depths", 1, "--fillers", "landmark"),
    "lookup": ("--lengths", "1K", "--questions", 2),
    "distraction": ("--documents", 2, "--tokens", 128, "--kinds", "keys"),
    "ruler": ("--lengths", "1K", "--samples", 1, "--tasks", "niah_single"),
    "perplexity": ("--most", 1, "--pieces", 2, "--file-tokens", 200),
    "dense": ("--lengths", "1K", "--questions", 2, "--ks", "1", "--haystacks", "lookup"),
    "approximation": ("--tokens", "1K", "--questions", 1, "--index", "Flat", "--haystacks", "keys"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2)


def fot(*arguments: object, model: Path | None = None) -> Result:
    """Run `fot eval`; what it raises is in the result."""
    app = typer.Typer()
    app.callback()(lambda: None)
    evaluate.register(app)
    place = () if model is None else ("--model", model, "--mem-layers", 1, "--window", 192)
    return CliRunner().invoke(app, ["eval", *map(str, (*arguments, *place))])


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_prints_a_table_and_writes_json_and_a_plot(study: str, model: Path, tmp_path: Path) -> None:
    written, drawn = tmp_path / "report.json", tmp_path / "plot.png"
    done = fot(study, *QUICK[study], "--json", written, "--plot", drawn, model=model)
    assert done.exception is None or done.exit_code == 0, done.exception
    told = json.loads(written.read_text())
    assert told["study"] == study and told["figures"] and told["protocol"].startswith(f"`fot eval {study}`")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert study in done.stdout and all(name in done.stdout for name in told["figures"])
    assert f"{study} 0/" in done.stderr and str(drawn) in done.stderr


def test_json_alone_goes_to_standard_output(model: Path) -> None:
    done = fot("lookup", *QUICK["lookup"], "--json", "-", "--seed", 3, "--top-k", 5, "--engine", "exact", model=model)
    settings = json.loads(done.stdout)["settings"]
    assert (settings["seed"], settings["top_k"], settings["engine"]) == (3, 5, "exact")


def test_several_models_are_compared_where_that_is_the_study(model: Path) -> None:
    done = fot("distraction", *QUICK["distraction"], "--json", "-", "--model", model, model=model)
    assert {row["model"] for row in json.loads(done.stdout)["rows"]} == {"tiny 1", "tiny 2"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("lookup", "--model", "nowhere"), "no checkpoint"),
        (("lookup", "--json", "/nowhere/report.json"), "no directory"),
        (("lookup", "--plot", "plot.pdf"), "must end in .png"),
        (("lookup", "--lengths", "many"), "numbers of tokens"),
        (("lookup", "--search", "nprobe"), "name=number"),
        (("needle", "--fillers", "hay"), "landmark"),
        (("dense", "--haystacks", "hay"), "keys, lookup"),
        (("ruler", "--tasks", "hay"), "niah_single"),
        (("distraction", "--documents", "3"), "power of two"),
        (("approximation", "--tokens", "1K,2K"), "one length"),
    ],
)
def test_mistakes_are_told_before_work(model: Path, arguments: tuple[str, ...], reason: str) -> None:
    named = None if "--model" in arguments else model
    done = fot(*arguments, model=named)
    assert isinstance(done.exception, FotError) and reason in done.exception.message
    assert done.stdout == ""


def test_a_study_of_one_model_refuses_two(model: Path) -> None:
    done = fot("lookup", "--model", model, model=model)
    assert isinstance(done.exception, FotError) and "one --model" in done.exception.message


def test_a_checkpoint_without_memory_layers_is_told(model: Path) -> None:
    done = fot("lookup", "--model", model)
    assert isinstance(done.exception, FotError) and "--mem-layers" in done.exception.message


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_has_help_and_the_shared_options(study: str) -> None:
    told = fot(study, "--help").stdout
    assert all(
        option in told for option in ("--model", "--memory", "--top-k", "--engine", "--json", "--plot", "--seed")
    )
