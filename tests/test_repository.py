"""The repository keeps its own promises: stubs match protos, documents run, every command has help."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SOURCES = sorted(
    path
    for folder in ("memory_service", "model_worker", "tests", "deploy", "docs", "protos", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
) + sorted(path for path in ROOT.iterdir() if path.is_file())


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# --- Stubs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proto", sorted((ROOT / "protos").rglob("*.proto")), ids=lambda path: path.stem)
def test_stubs_are_what_the_protos_generate(proto: Path, tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    name = proto.relative_to(ROOT / "protos")
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-Iprotos", *outputs, name], cwd=ROOT, check=True)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*") if path.is_file()}
    assert fresh
    for path, content in fresh.items():
        assert (ROOT / path).read_text() == content, f"{path} is stale: run `make protos`"


# --- Commands -------------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, click.Command]]:
    from memory_service.cli import app

    found: list[tuple[str, click.Command]] = []
    waiting: list[tuple[str, click.Command]] = [("fot", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        found.append((name, command))
        waiting += [(f"{name} {sub}", one) for sub, one in getattr(command, "commands", {}).items()]
    return found


def test_every_command_and_option_has_help() -> None:
    without = [name for name, command in commands() if not command.help]
    without += [
        f"{name} {parameter.opts[0]}"
        for name, command in commands()
        for parameter in command.params
        if not getattr(parameter, "help", "") and "--help" not in parameter.opts
    ]
    assert without == []


def test_the_promised_commands_exist() -> None:
    names = {name for name, _ in commands()}
    promised = "serve verify doctor stats|memory create|memory ls|memory show|memory rm|docs ls|docs rm".replace(
        " v", "|v"
    )
    promised = promised.replace("verify doctor stats", "verify|doctor|stats")
    for command in [*promised.split("|"), "bench attend", "bench ingest", "bench wire"]:
        assert f"fot {command}" in names


# --- Documents ------------------------------------------------------------------------------------------------------

DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "deploy/README.md"]
BLOCK = re.compile(r"<!-- runnable -->\n```bash\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)


def plain(output: str) -> list[str]:
    """Lines without what differs from run to run: times, and the padding of columns."""
    dated = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "(time)", output)
    return [line.rstrip() for line in dated.rstrip().splitlines()]


def test_the_readme_has_commands_that_run() -> None:
    assert len(BLOCK.findall((ROOT / "README.md").read_text())) >= 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_documented_commands_run_and_print_what_is_shown(document: Path, tmp_path: Path) -> None:
    environment = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path), "COLUMNS": "100"}
    for script, output in BLOCK.findall(document.read_text()):
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", script],
            cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert plain(done.stdout) == plain(output)


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("package", ["memory_service", "model_worker"])
def test_the_architecture_names_every_module_on_the_floor_it_is_held_to(package: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one.get("containers") == [package]]
    floors = {
        module: floor for floor, modules in enumerate(reversed(layers)) for module in re.split(r" [:|] ", modules)
    }
    (tree,) = re.findall(rf"```\n{package}/\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    told = {
        module: int(floor)
        for line, floor in re.findall(r"^  (\S.*? (\d+)  .*)$", tree, re.MULTILINE)
        for module in re.findall(r"\b([a-z_0-9]+)(?:\.py\b|/  )", line)
    }
    assert told == floors
    # A room of the tree that names its files names all of them.
    for room, inside in re.findall(r"^  (\w+)/  .*\n((?:      .*\n)+)", tree, re.MULTILINE):
        files = {path.name for path in (ROOT / package / room).glob("*.py")} - {"__init__.py"}
        assert set(re.findall(r"\b[a-z_0-9]+\.py\b", inside)) == files


# --- Package --------------------------------------------------------------------------------------------------------


def test_exports_are_exact_and_exist() -> None:
    package = importlib.import_module("memory_service")
    assert sorted(package.__all__) == sorted(set(package.__all__))
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
    assert {"Memory", "AsyncMemory", "Client", "merge", "MemorySpec", "Fingerprint"} <= set(package.__all__)


def test_importing_the_package_opens_nothing_and_imports_no_server() -> None:
    code = (
        "import sys, memory_service; print([m for m in ('faiss', 'memory_service.server.server') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_commands_of_fot_are_known_before_anything_slow_is_imported() -> None:
    slow = ("torch", "grpc", "faiss", "numpy", "ray", "transformers")
    code = f"import sys, memory_service.cli; print([one for one in {slow} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["memory_service", "memory_service.client"])
def test_a_package_s_names_are_those_its_type_checker_sees(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    (block,) = [one for one in ast.parse(Path(module.__file__).read_text()).body if _is_for_types(one)]
    told = {alias.name: one.module for one in block.body if isinstance(one, ast.ImportFrom) for alias in one.names}
    assert sorted(told) == sorted(module.__all__)
    for name, home in told.items():
        assert getattr(module, name) is getattr(importlib.import_module(home or ""), name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr(module, "nonsense")  # noqa: B009


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name)


def test_every_dependency_is_pinned() -> None:
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *extras["dev"], *extras["worker"]]
    names = {re.split(r"[<>=\[ ]", requirement)[0].lower() for requirement in wanted}
    assert names <= pinned


def test_pins_name_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line)] == []


FORBIDDEN = re.compile(
    r"\bpickle\b|\btorch\.load\b|\bmarshal\b|\bjoblib\b|\bindex-url\b|/(?:work|root|farm|opt/pypi)/|\.\./shared\b"
)
MAY_NAME_THEM = {"pyproject.toml", "test_repository.py", "words.txt"}  # They forbid them, or list English words.


def test_no_forbidden_words() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in SOURCES
        if path.name not in MAY_NAME_THEM and "_pb2" not in path.name
        for match in FORBIDDEN.finditer(path.read_text(errors="ignore"))
    ]
    assert found == []


def test_no_unfinished_work_is_left_behind() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|\bNotImplementedError\b")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in SOURCES
        if path.suffix == ".py" and path.name != "test_repository.py" and "_pb2" not in path.name
        for match in unfinished.finditer(path.read_text())
    ]
    assert found == []
