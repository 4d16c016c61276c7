"""The command line: what it prints, for people and for machines, how it fails, and how it stops."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service import Client, DType, Fingerprint, Memory, MemorySpec, NotFound, Unavailable
from memory_service.cli import doctor
from memory_service.cli.environment import known_variables
from memory_service.cli.serve import _bytes, _plain, _settings
from tests.command import Fot
from tests.memory_service.places import QUIET, serving

SPEC = MemorySpec(Fingerprint("tiny"), (3,), 2, 8, DType.F32)
FOT = (sys.executable, "-m", "memory_service.cli")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with a memory of three documents."""
    directory = tmp_path / "data"
    with Memory.open(directory, "notes", SPEC, options=QUIET) as memory:
        for number, metadata in enumerate(({"lang": "py", "year": 2020}, {"lang": "c"}, {})):
            keys = torch.full((1, 2, 10 + number, 8), float(number))
            memory.put(f"doc-{number}", keys, keys, metadata=metadata)
    return directory


CREATE = ("--model", "tiny", "--layers", "3", "--kv-heads", 2, "--head-dim", 8, "--dtype", "f32")

# --- Memories and documents -----------------------------------------------------------------------------------------


def test_a_memory_is_created_listed_shown_and_removed(fot: Fot, tmp_path: Path) -> None:
    place = ("--target", tmp_path / "data")
    made = fot("memory", "create", "notes", *CREATE, *place)
    assert made == (0, "Created memory notes: tiny, layer 3, 2 × 8, f32; 128 B a token.\n", "")
    assert fot("memory", "create", "notes", *CREATE, *place).code == 0
    listed = fot("memory", "ls", *place).out.splitlines()
    assert listed[0].split() == ["memory", "keeps", "documents", "tokens", "size"]
    assert listed[1].split() == ["notes", "tiny,", "layer", "3,", "2", "×", "8,", "f32", "0", "0", "0", "B"]
    shown = fot("memory", "show", "notes", *place).out
    assert "index      auto, from 65,536 tokens\n" in shown
    assert fot("memory", "rm", "notes", "--yes", *place).out == "Removed memory notes.\n"
    assert fot("memory", "ls", *place).out == "No memories yet: fot memory create.\n"


def test_a_created_memory_is_what_was_asked_for(fot: Fot, tmp_path: Path) -> None:
    given = ("--revision", "r1", "--weights", "c0ffee", "--rope", "{}", "--index", "none", "--index-after", 7)
    fot("memory", "create", "notes", *CREATE, *given, "--target", tmp_path)
    with Client.open(tmp_path, options=QUIET) as client:
        spec = client.memory("notes").spec
    assert spec.fingerprint == Fingerprint("tiny", "r1", "c0ffee", "{}")
    assert (spec.layers, spec.kv_heads, spec.head_dim, spec.dtype) == ((3,), 2, 8, DType.F32)
    assert (spec.index.factory, spec.index.min_tokens) == ("none", 7)


def test_documents_are_listed_filtered_shown_and_removed(fot: Fot, data: Path) -> None:
    place = ("--target", data)
    lines = fot("docs", "ls", "notes", *place).out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["doc-0", "10"], ["doc-1", "11"], ["doc-2", "12"]]
    assert "lang=py, year=2020" in lines[1]
    found = fot("docs", "ls", "notes", "--where", "lang = py or lang not exists", "--json", *place).json
    assert [one["id"] for one in found] == ["doc-0", "doc-2"]
    assert found[0]["metadata"] == {"lang": "py", "year": 2020}
    assert "raise --limit above 2" in fot("docs", "ls", "notes", "--limit", 2, *place).out
    assert fot("docs", "ls", "notes", "--where", "lang = go", *place).out == "No documents of notes match lang = go.\n"
    assert "tokens      11\n" in fot("docs", "show", "notes", "doc-1", *place).out
    assert (
        fot("docs", "rm", "notes", "--where", "lang exists", "-y", *place).out
        == "Removed 2 documents of memory notes.\n"
    )
    assert fot("docs", "rm", "notes", "doc-2", "-y", *place).out == "Removed 1 document of memory notes.\n"
    assert fot("docs", "ls", "notes", *place).out == "Memory notes has no documents yet.\n"


def test_removing_asks_first(fot: Fot, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (("memory", "rm", "notes"), ("docs", "rm", "notes", "doc-0")):
        monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
        assert fot(*command, "--target", data).code == 1
    assert len(fot("docs", "ls", "notes", "--json", "--target", data).json) == 3


def test_figures_are_shown(fot: Fot, data: Path) -> None:
    assert "documents  3\n" in fot("stats", "notes", "--target", data).out
    assert fot("stats", "--json", "--target", data).json["tokens"] == 33


def test_long_work_is_started_and_watched(fot: Fot, data: Path) -> None:
    place = ("notes", "--target", data)
    assert re.fullmatch(r"[\d,]+ bytes in \d segments? match their checksums\.\n", fot("memory", "verify", *place).out)
    assert fot("memory", "index", *place, "--json").json["state"] == "done"
    fot("docs", "rm", "notes", "doc-0", "--yes", "--target", data)
    assert fot("memory", "compact", *place).code == 0
    assert fot("stats", "notes", "--json", "--target", data).json["dead_bytes"] == 0
    (path, *_) = data.glob("memories/*/seg-*")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    done = fot("memory", "verify", *place)
    assert done.code == 1
    assert path.name in done.err


def test_json_of_a_memory_is_complete(fot: Fot, data: Path) -> None:
    (found,) = fot("memory", "ls", "--json", "--target", data).json
    assert found == fot("memory", "show", "notes", "--json", "--target", data).json
    assert found["spec"]["fingerprint"] == {"model": "tiny", "revision": "", "weights": "", "rope": ""}
    assert (found["spec"]["dtype"], found["documents"], found["tokens"]) == ("f32", 3, 33)


def test_the_target_comes_from_the_environment_too(fot: Fot, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOT_TARGET", str(data))
    assert len(fot("docs", "ls", "notes", "--json").json) == 3


# --- Failing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("memory", "show", "nowhere", "-t", "DATA"), "no memory 'nowhere'"),
        (("memory", "ls", "-t", "DATA/typo"), "there is no directory"),
        (("memory", "ls", "-t", "http://x"), "cannot open 'http://x'"),
        (("memory", "create", "a/b", *CREATE, "-t", "DATA"), "a memory's name must be"),
        (("memory", "create", "notes", *CREATE, "--revision", "2", "-t", "DATA"), "exists with another spec"),
        (("docs", "ls", "notes", "--where", "lang =", "-t", "DATA"), "expected a value at lang =⟨here⟩"),
        (("docs", "show", "notes", "x", "-t", "DATA"), "has no document 'x'"),
        (("token", "ls", "--tokens", "DATA/none"), "there is no token file"),
        (("verify", "DATA/none"), "there is no directory"),
        (("verify", "DATA/memories"), "has no catalogue"),
        (("serve", "DATA", "--listen", "0.0.0.0:0"), "can be reached from other machines"),
        (("serve", "DATA", "--listen", "nonsense"), "an address is 'host:port'"),
        (("serve", "DATA", "--log-level", "loud"), "FOT_LOG_LEVEL cannot be 'loud'"),
    ],
)
def test_a_failure_is_one_sentence_and_code_1(fot: Fot, data: Path, arguments: tuple[Any, ...], told: str) -> None:
    done = fot(*(str(argument).replace("DATA", str(data)) for argument in arguments))
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("fot: ")
    assert told in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("dance",),
        ("memory", "create", "notes"),
        ("memory", "create", "notes", *CREATE[:2], "--layers", "x", *CREATE[4:]),
        ("docs", "rm", "notes", "-t", "."),
        ("docs", "ls", "notes", "--limit", "0"),
        ("serve",),
        ("serve", ".", "--resident", "much"),
        ("token", "create", "x"),
        ("token", "create", "x", "--tokens", "t", "--expires", "soon"),
    ],
)
def test_a_wrong_command_line_is_code_2(fot: Fot, arguments: tuple[str, ...]) -> None:
    done = fot(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage" in done.err


def test_the_version_is_that_of_the_distribution(fot: Fot) -> None:
    assert fot("--version") == (0, f"fot {version('fot-memory')}\n", "")


def test_a_misspelt_variable_is_refused(fot: Fot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOT_LISTN", "1")
    done = fot("memory", "ls")
    assert done == (1, "", "fot: the environment variable FOT_LISTN means nothing to fot; is it FOT_LISTEN?\n")


def test_an_unreachable_service_is_told_so(fot: Fot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_service.cli.console.PATIENCE_S", 0.3)
    done = fot("memory", "ls", "-t", "grpc://127.0.0.1:1")
    assert done.code == 1
    assert re.fullmatch(
        r"fot: the service at grpc://127.0.0.1:1 cannot be reached \(.*\); is it running .*\n", done.err
    )


def test_a_defect_is_one_line_unless_asked(fot: Fot, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr(Client, "stats", lambda self: 1 / 0)
    monkeypatch.setattr(Client, "run", lambda self, verb: 1 / 0)
    done = fot("stats", "-t", data)
    assert done == (1, "", "fot: a defect of fot: ZeroDivisionError: division by zero (FOT_DEBUG=1 tells more)\n")


# --- Tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_are_made_listed_and_revoked(fot: Fot, tmp_path: Path) -> None:
    file = ("--tokens", tmp_path / "tokens.json")
    made = fot("token", "create", "worker", "--tenant", "acme", "--role", "write", "--expires", "30d", *file)
    token = made.out.strip()
    assert re.fullmatch(r"fot_[\w-]{43}", token)
    assert "it is not shown again" in made.err
    assert token not in (tmp_path / "tokens.json").read_text()
    assert fot("token", "create", "worker", *file).code == 1
    (listed,) = fot("token", "ls", "--json", *file).json
    assert (listed["name"], listed["tenant"], listed["role"], listed["expired"]) == ("worker", "acme", "write", False)
    assert "sha256" not in listed
    assert "worker  acme    write" in fot("token", "ls", *file).out
    assert fot("token", "revoke", "worker", *file).out == "Revoked token worker.\n"
    assert fot("token", "ls", *file).out == "No tokens yet: fot token create.\n"


def test_a_token_opens_a_service(fot: Fot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens.json"
    made = fot("token", "create", "boss", "--role", "admin", "--json", "--tokens", file).json
    kept = tmp_path / "token"
    kept.write_text(made["token"])
    with serving(None, tokens=file) as target:
        refused = fot("memory", "ls", "-t", target)
        assert refused.code == 1
        assert "token" in refused.err
        assert fot("memory", "create", "notes", *CREATE, "-t", target, "--token-file", kept).code == 0
        monkeypatch.setenv("FOT_TOKEN", made["token"])
        assert [one["name"] for one in fot("memory", "ls", "--json", "-t", target).json] == ["notes"]


# --- Verify and doctor ----------------------------------------------------------------------------------------------


def test_a_whole_directory_verifies(fot: Fot, data: Path) -> None:
    done = fot("verify", data)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"3 documents in \d segments?, .* KiB: all is well\.\n", done.out)
    assert fot("verify", data, "--json").json["problems"] == []


def test_a_flipped_bit_is_found_and_named(fot: Fot, data: Path) -> None:
    path = sorted(data.glob("memories/*/seg-*"))[-1]
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    done = fot("verify", data)
    assert done.code == 1
    assert path.name in done.out
    assert "doc-2" in done.out
    assert done.out.endswith("1 segment damaged.\n")
    assert len(fot("verify", data, "--json").json["problems"]) == 1


def test_a_lost_catalogue_is_rebuilt(fot: Fot, data: Path) -> None:
    for path in data.glob("catalog.sqlite*"):
        path.unlink()
    assert fot("verify", data).code == 1
    done = fot("verify", data, "--rebuild-catalog")
    assert (done.code, done.out.splitlines()[0]) == (
        0,
        "Rebuilt the catalogue from the segments: 3 documents in 1 memory.",
    )
    with Memory.open(data, "notes", options=QUIET) as memory:
        assert [one.id for one in memory.documents()] == ["doc-0", "doc-1", "doc-2"]
        assert memory.get("doc-0").metadata == {"lang": "py", "year": 2020}


def test_a_directory_in_use_is_not_verified(fot: Fot, data: Path) -> None:
    with Memory.open(data, "notes", options=QUIET):
        done = fot("verify", data)
    assert done.code == 1
    assert f"in use by process {os.getpid()}" in done.err


def test_the_doctor_looks_at_everything(fot: Fot, tmp_path: Path) -> None:
    found = {one["what"]: one for one in fot("doctor", tmp_path, "--json").json}
    looked = "Python torch grpcio safetensors faiss SQLite CPU RAM CUDA|open files|file system|free space|fsync"
    assert set(looked.replace(" ", "|", 8).split("|")) <= set(found)
    assert {one["verdict"] for one in found.values()} <= {"ok", "warn"}
    assert re.fullmatch(r"\d+\.\d ms, at worst \d+\.\d ms of 20", found["fsync"]["found"])
    assert fot("doctor", tmp_path / "not" / "yet").code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "verdict"), [("3.40.1", "warn"), ("3.51.2", "warn"), ("3.51.3", "ok"), ("3.53.0", "ok")]
)
def test_the_doctor_knows_sqlites_bug(version: str, verdict: str) -> None:
    assert doctor._sqlite(version).verdict == verdict


@pytest.mark.parametrize(("kind", "advice"), [("ext4", ""), ("nfs4", "network"), ("cifs", "network"), ("tmpfs", "RAM")])
def test_the_doctor_knows_file_systems(kind: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_file_system", lambda path: (kind, "/data"))
    first = next(iter(doctor._disk(tmp_path)))
    assert advice in first.advice
    assert bool(first.advice) == bool(advice)


def test_the_doctor_says_where_it_may_not_write(fot: Fot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    done = fot("doctor", tmp_path)
    assert done.code == 1
    assert "give a directory you may write to" in done.out


# --- Serve ----------------------------------------------------------------------------------------------------------


@contextmanager
def served(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `fot serve` of its own and the first line it prints."""
    command = [*FOT, "serve", *map(str, arguments)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("FOT_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ours | environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_the_service_says_where_it_is_keeps_what_it_took_and_drains(tmp_path: Path) -> None:
    keys = torch.ones(1, 2, 4, 8)
    directory = tmp_path / "data"
    with served(directory, "--listen", "127.0.0.1:0", FOT_STORE__TENANT_MEMORIES="1") as (process, line):
        match = re.fullmatch(rf"fot serves {re.escape(str(directory))} at (grpc://127\.0\.0\.1:\d+)\n", line)
        assert match
        with Client.open(match[1]) as client:
            memory = client.memory("notes", SPEC)
            memory.put("d", keys, keys)
            with pytest.raises(Exception, match="the tenant has 1 memories"):
                client.memory("more", SPEC)
            acknowledged: list[str] = []
            refused: list[BaseException] = []

            def write() -> None:
                try:
                    while True:
                        memory.put(f"d-{len(acknowledged):05}", keys, keys, timeout_s=2.0)
                        acknowledged.append(f"d-{len(acknowledged):05}")
                except Unavailable as error:
                    refused.append(error)

            writer = threading.Thread(target=write)
            writer.start()
            while len(acknowledged) < 3 and writer.is_alive():
                pass
            process.send_signal(signal.SIGTERM)
            writer.join()
        assert process.wait(20) == 0
    assert len(refused) == 1
    with Memory.open(directory, "notes", options=QUIET) as again:
        kept = [one.id for one in again.documents()]
    # What was under way at the end may have been stored too.
    assert kept[: len(acknowledged) + 1] == ["d", *acknowledged]
    assert len(kept) <= len(acknowledged) + 2


def test_a_service_may_forget(tmp_path: Path) -> None:
    with served(":memory:", "--listen", f"unix:{tmp_path / 's'}") as (process, line):
        assert line == f"fot serves :memory: at unix:{tmp_path / 's'}\n"
        with pytest.raises(NotFound):
            Memory.open(f"unix:{tmp_path / 's'}")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_settings_come_from_options_then_the_environment_then_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOT_QUEUE", "7")
    monkeypatch.setenv("FOT_LISTEN", "127.0.0.1:1")
    monkeypatch.setenv("FOT_STORE__DEVICE", "cuda")
    monkeypatch.setenv("FOT_STORE__SESSION_BYTES", "5")
    settings = _settings(listen="127.0.0.1:2", store={"session_bytes": 6})
    assert (settings.queue, settings.listen, settings.calls) == (7, "127.0.0.1:2", 4096)
    assert (settings.store.device, settings.store.session_bytes) == ("cuda", 6)


def test_all_settings_are_listed(fot: Fot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOT_QUEUE", "7")
    listed = fot("settings", "--json").json
    assert set(listed) | {"FOT_TARGET", "FOT_TOKEN", "FOT_TOKEN_FILE", "FOT_CA", "FOT_DEBUG"} == set(known_variables())
    assert listed["FOT_QUEUE"] == 7
    assert len(listed) == len(_plain(_settings()))
    assert re.search(r"^FOT_QUEUE +7 +256$", fot("settings").out, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "expected"), [("1000", 1000), ("8GiB", 8 << 30), ("8g", 8 << 30), ("512 MB", 512 << 20), (None, None)]
)
def test_sizes_are_read(text: str | None, expected: int | None) -> None:
    assert _bytes(text) == expected


# --- Benchmarks -----------------------------------------------------------------------------------------------------


def test_a_benchmark_writes_its_figures(fot: Fot, tmp_path: Path) -> None:
    assert fot("bench", "wire", "--json", tmp_path / "wire.json").code == 0
    assert json.loads((tmp_path / "wire.json").read_text())["figures"]["pushdown_bytes_per_token"] <= 50_000
