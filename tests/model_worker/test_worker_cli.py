"""The worker's part of the command line: light until it works, clear about mistakes, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from memory_service import ALL_DOCUMENTS, DType, InvalidArgument, Memory, Where
from memory_service.cli import app, console
from model_worker import cli
from model_worker.cli import options
from model_worker.cli.opening import load_model, load_tokenizer
from model_worker.cli.progress import Progress
from model_worker.corpus import Source
from model_worker.ingestion.intake import IngestReport
from model_worker.settings import LogitScaling, SelfExtend
from tests.command import Fot
from tests.memory_service.places import serving
from tests.model_worker.tiny import save_tiny, save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "one.py").write_text("x = 1\n")
    (root / "two.md").write_text("# Two\n")
    (root / "three.bin").write_bytes(b"\0\1\2")
    return root


def documents(target: object, name: str = "default", where: Where = None) -> list[str]:
    with Memory.open(str(target), name) as memory:
        return [document.id for document in memory.documents(where)]


# --- The command tree -----------------------------------------------------------------------------------------------


def test_the_tree_has_the_workers_commands_without_importing_what_they_need() -> None:
    code = (
        "import sys, typer; from memory_service.cli import app; tree = typer.main.get_command(app).commands;"
        "print(*tree, *tree['bench'].commands);"
        f"print(*(name for name in {cli.EXTRA} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    commands, imported = done.stdout.splitlines()
    assert {"ingest", "ask", "generate", "attention", "prefill", "decode"} <= set(commands.split())
    assert imported == ""


def test_a_missing_extra_is_named_with_the_way_to_get_it(fot: Fot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "datasets" else True)
    done = fot("ingest", "x", "--model", "y", "--memory", "z")
    assert (done.code, done.out) == (1, "")
    assert done.err == "fot: this command needs datasets: pip install 'fot-memory[worker]'\n"


def test_commands_that_cannot_be_imported_leave_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = EntryPoint("broken", "no_such_module:register", "fot.commands")
    command_tree = sys.modules["memory_service.cli.main"]
    monkeypatch.setattr(command_tree, "entry_points", lambda group: [broken])
    command_tree._add_commands_of_others()
    assert "no_such_module:register are missing" in capsys.readouterr().err


def test_the_target_is_the_one_of_the_other_commands() -> None:
    assert options.TARGET == console.TARGET
    ingest = typer.main.get_command(app).commands["ingest"]  # type: ignore[attr-defined]
    read_from = {parameter.name: parameter.envvar for parameter in ingest.params}
    assert (read_from["target"], read_from["token_file"], read_from["ca"]) == ("FOT_TARGET", "FOT_TOKEN_FILE", "FOT_CA")


# --- What options mean ----------------------------------------------------------------------------------------------


def test_layers_are_numbers_with_commas() -> None:
    assert options.layers_of("6,2, 12") == (2, 6, 12)
    assert options.layers_of(None) is None
    with pytest.raises(InvalidArgument, match="such as 2 or 2,4, got 'all'"):
        options.layers_of("all")


def test_metadata_are_numbers_and_flags_unless_quoted() -> None:
    given = ["lang=python", "year=2020", "score=0.5", "done=true", 'code="007"', "formula=a=b"]
    assert options.metadata_of(given) == {
        "lang": "python", "year": 2020, "score": 0.5, "done": True, "code": "007", "formula": "a=b",
    }  # fmt: skip
    with pytest.raises(InvalidArgument, match="takes name=value"):
        options.metadata_of(["alone"])


def test_search_options_are_numbers() -> None:
    assert options.search_of(["nprobe=32", "candidates=1.5"]) == {"nprobe": 32, "candidates": 1.5}
    for wrong in ("nprobe", "nprobe=many", "=3", "nprobe=nan"):
        with pytest.raises(InvalidArgument, match="takes name=number"):
            options.search_of([wrong])


def test_self_extend_needs_both_numbers() -> None:
    assert options.self_extend_of(None, None) is None
    assert options.self_extend_of(4, 512, LogitScaling.LOG) == SelfExtend(4, 512, LogitScaling.LOG)
    with pytest.raises(InvalidArgument, match="both --group and --neighbours"):
        options.self_extend_of(4, None)


def test_recall_takes_all_documents_some_or_none() -> None:
    assert options.recall_of().documents == ALL_DOCUMENTS
    assert options.recall_of(["a", "b"], "lang = python", top_k=32).documents == ("a", "b")
    assert options.recall_of(no_documents=True).documents == ()
    with pytest.raises(InvalidArgument, match="contradicts"):
        options.recall_of(["a"], no_documents=True)


def test_memory_layers_come_from_the_caller_the_memory_the_checkpoint_or_are_one(model: Path, tmp_path: Path) -> None:
    with load_model(model, None) as loaded:
        assert loaded.fot.mem_layers == (2,)
    with load_model(model, None, mem_layers=(1, 3), mem_dtype=DType.F32) as loaded:
        spec = loaded.spec
        assert spec.layers == (1, 3)
    with Memory.open(":memory:", spec=spec) as memory, load_model(model, memory) as loaded:
        assert loaded.fot.mem_layers == (1, 3) and loaded.fot.mem_dtype is DType.F32
    with Memory.open(":memory:", spec=spec) as memory, pytest.raises(InvalidArgument, match="stores f32"):
        load_model(model, memory, mem_dtype=DType.BF16)
    shallow = save_tiny_llama(tmp_path / "shallow", num_hidden_layers=2)
    with load_model(shallow, None, window=64, dtype=DType.BF16) as loaded:
        assert (loaded.fot.mem_layers, loaded.fot.window, loaded.dtype) == ((1,), 64, torch.bfloat16)


def test_what_is_no_checkpoint_or_has_no_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no config.json; --model takes a directory"):
        load_model(tmp_path, None)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(InvalidArgument, match="no tokenizer"):
        load_tokenizer(tmp_path)


# --- fot ingest -----------------------------------------------------------------------------------------------------


def test_ingest_makes_the_memory_and_says_what_it_did(fot: Fot, model: Path, corpus: Path, tmp_path: Path) -> None:
    done = fot("ingest", corpus, "--model", model, "--memory", tmp_path / "memory", "--metadata", "year=2020")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "2 added, 0 replaced, 0 unchanged; memory default has 2 documents."
    assert lines[1].startswith("14 tokens in ")
    assert lines[2] == "1 time: is binary, as three.bin."
    assert documents(tmp_path / "memory", where="year = 2020 and lang = python") == ["one.py"]


def test_ingest_over_grpc_into_a_named_memory_tells_machines(fot: Fot, model: Path, corpus: Path) -> None:
    with serving(None) as target:
        arguments = ("ingest", corpus, "--model", model, "--memory", target, "--name", "books", "--json")
        first = json.loads(fot(*arguments, "--mem-layers", "1,2", "--mem-dtype", "f32").out)
        again = json.loads(fot(*arguments).out)
        with Memory.open(target, "books") as memory:
            assert (memory.spec.layers, memory.spec.dtype) == ((1, 2), DType.F32)
    assert (first["added"], first["tokens"], first["memory"], first["memory_documents"]) == (2, 14, "books", 2)
    assert first["left_out"] == [{"why": "is binary", "times": 1, "first": "three.bin"}]
    assert (again["added"], again["unchanged"]) == (0, 2)


def test_ingest_replaces_prunes_and_limits(fot: Fot, model: Path, corpus: Path, tmp_path: Path) -> None:
    def ingest(*more: object) -> dict[str, Any]:
        done = fot("ingest", corpus, "--model", model, "--memory", tmp_path / "memory", "--json", *more)
        assert done.code == 0, done.err
        return dict(json.loads(done.out))

    assert ingest("--limit", 1)["added"] == 1
    assert ingest()["added"] == 1
    (corpus / "one.py").write_text("x = 2\n")
    (corpus / "two.md").unlink()
    assert ingest("--prefix", "copy/", "--include", "*.py")["added"] == 1
    pruned = ingest("--prune", "--exclude", "*.bin")
    assert (pruned["replaced"], pruned["removed"], pruned["left_out"]) == (1, 2, [])
    assert documents(tmp_path / "memory") == ["one.py"]


def test_pruning_under_a_prefix_leaves_the_rest(fot: Fot, model: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ("ingest", corpus, "--model", model, "--memory", tmp_path / "memory", "--json")
    fot(*arguments)
    fot(*arguments, "--prefix", "a/")
    (corpus / "two.md").unlink()
    assert json.loads(fot(*arguments, "--prefix", "a/", "--prune").out)["removed"] == 1
    assert documents(tmp_path / "memory") == ["a/one.py", "one.py", "two.md"]


def test_pruning_a_file_leaves_its_neighbours(fot: Fot, model: Path, corpus: Path, tmp_path: Path) -> None:
    (corpus / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    arguments = ("--model", model, "--memory", tmp_path / "memory", "--json", "--prune")
    fot("ingest", corpus, *arguments)
    (corpus / "rows.jsonl").write_text('{"text": "a"}\n')
    (corpus / "two.md").unlink()
    assert json.loads(fot("ingest", corpus / "rows.jsonl", *arguments).out)["removed"] == 1
    assert documents(tmp_path / "memory") == ["one.py", "rows.jsonl#0", "two.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "there is no file or directory absent"),
        (["{corpus}", "--prune", "--limit", "3"], "--prune would remove everything beyond --limit"),
        (["{corpus}", "--mem-layers", "9"], "9"),
        (["{corpus}", "--overlap", "4096"], "overlap must be 0 to window - 1"),
        (["{corpus}", "--metadata", "fot.x=1"], "begins with fot."),
        (["{corpus}/three.bin", "--format", "parquet"], "cannot be read as Parquet"),
    ],
)
def test_mistakes_end_with_one_sentence(
    fot: Fot, model: Path, corpus: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [one.replace("{corpus}", str(corpus)) for one in arguments]
    done = fot("ingest", *given, "--model", model, "--memory", tmp_path / "memory")
    assert (done.code, done.out) == (1, "")
    assert message in done.err and "defect" not in done.err


def test_a_memory_of_another_model_is_refused(fot: Fot, model: Path, corpus: Path, tmp_path: Path) -> None:
    assert fot("ingest", corpus, "--model", model, "--memory", tmp_path / "memory").code == 0
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    done = fot("ingest", corpus, "--model", other, "--memory", tmp_path / "memory")
    assert done.code == 1 and "create another memory" in done.err


def test_an_unreachable_service_is_said(fot: Fot, model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_worker.cli.opening.PATIENCE_S", 0.3)
    done = fot("ingest", corpus, "--model", model, "--memory", "grpc://127.0.0.1:1")
    assert done.code == 1 and "grpc://127.0.0.1:1 cannot be reached" in done.err


def test_a_run_that_fails_says_what_stays(fot: Fot, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\nbad\n')
    done = fot("ingest", file, "--model", model, "--memory", tmp_path / "memory")
    assert done.code == 1
    assert "stopped; what this run stored stays (0 documents), and the same command goes on from there" in done.err
    assert "line 2" in done.err


def test_an_interrupted_run_says_how_to_go_on(
    fot: Fot, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[Source]:
        yield Source("a", "text")
        raise KeyboardInterrupt

    monkeypatch.setattr("model_worker.cli.ingest_job.read", interrupted)
    done = fot("ingest", corpus, "--model", model, "--memory", tmp_path / "memory")
    assert (done.code, done.out) == (130, "")
    assert "the same command goes on from there" in done.err


# --- Progress -------------------------------------------------------------------------------------------------------


def test_progress_is_a_line_now_and_then_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("model_worker.cli.progress.time.monotonic", lambda: now)
    with Progress(total_bytes=1000) as progress:
        progress.reached(IngestReport(unchanged=5, bytes_read=500))
        progress.encoded(0)
        now += 4
        progress.encoded(2000)
        assert capsys.readouterr().err == ""
        now += 6
        progress.encoded(8000)
        progress.reached(IngestReport(unchanged=5, added=2, bytes_read=600))
        now += 10
        progress.reached(IngestReport(unchanged=5, added=2, bytes_read=600))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "5 documents, 10,000 tokens, 1,000 tokens/s, 50%"
    assert second == "7 documents, 10,000 tokens, 500 tokens/s, 60%, 80 s left"
