"""Every command that deploy/ gives is one that `fot` and `ray` understand, with options that they have."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from ray.scripts.scripts import cli as ray

from memory_service.cli import app
from memory_service.cli.environment import known_variables

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROGRAMS: dict[str, Any] = {"fot": typer.main.get_command(app), "ray": ray}
# Typer has a click of its own, whose errors are not click's.
WRONG = (KeyError, click.UsageError, *typer.BadParameter.__bases__)
README = (DEPLOY / "README.md").read_text()
DOCKERFILE = (DEPLOY / "docker/Dockerfile").read_text()


def loaded(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def of_shell(script: str) -> Iterator[list[str]]:
    """The commands of a script that are for `fot` or `ray`, as words."""
    joined = re.sub(r"\\\n\s*", " ", script)
    for line in joined.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("|&;<>()"):
                if words and words[0] in PROGRAMS:
                    yield words
                    if words[1] == "exec":
                        yield from of_shell(words[-1])
                words = ["skipped"] if set(word) & set("<>") else []
            elif "=" not in word or words:
                words.append(word)


def of_images() -> Iterator[tuple[str, list[str]]]:
    for stage in DOCKERFILE.split("\nFROM ")[1:]:
        given = dict(re.findall(r"^(ENTRYPOINT|CMD) (\[.+\])$", stage, re.MULTILINE))
        if given:
            yield stage.split()[2], [*json.loads(given.get("ENTRYPOINT", "[]")), *json.loads(given["CMD"])]


def of_containers() -> Iterator[tuple[str, list[str]]]:
    for name, service in loaded("compose.yaml")["services"].items():
        command = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in service["command"]]
        yield f"compose {name}", command if service["image"].startswith("fot-worker") else ["fot", *command]
    for path in ("memory_service/stateful_set.yaml", "memory_cluster/caretaker.yaml"):
        for container in loaded(f"kubernetes/{path}")["spec"]["template"]["spec"]["containers"]:
            yield path, ["fot", *container["args"]]


def of_ray() -> Iterator[tuple[str, list[str]]]:
    for path in sorted(DEPLOY.glob("ray/*.yaml")):
        cluster = yaml.safe_load(path.read_text())
        for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
            for script in cluster[kind]:
                for words in of_shell(script):
                    yield f"{path.name} {kind}", words


def of_the_page() -> Iterator[tuple[str, list[str]]]:
    for script in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for words in of_shell(script):
            yield "README", words


MENTIONED = re.findall(r"`((?:fot|ray) [^`]+)`", README)
COMMANDS = [*of_images(), *of_containers(), *of_ray(), *of_the_page()]


def understood(words: list[str]) -> None:
    """Raises KeyError for a command that a program does not know, a usage error for an option or a value."""
    program, *rest = words
    command = PROGRAMS[program]
    while hasattr(command, "commands"):
        program, *rest = rest
        command = command.commands[program]
    command.make_context(program, [word for word in rest if word != "--help"], resilient_parsing="--help" in rest)


@pytest.mark.parametrize(
    "words", [words for _, words in COMMANDS], ids=[f"{w}: {' '.join(c)[:60]}" for w, c in COMMANDS]
)
def test_commands_are_understood(words: list[str]) -> None:
    understood(words)


@pytest.mark.parametrize("line", ["fot serve d --listenn a:1", "fot service d", "fot serve a b", "ray start --no-such"])
def test_commands_with_mistakes_are_not(line: str) -> None:
    (words,) = of_shell(line)
    with pytest.raises(WRONG):
        understood(words)


@pytest.mark.parametrize("mention", MENTIONED)
def test_commands_that_are_mentioned_exist_with_their_options(mention: str) -> None:
    program, *rest = shlex.split(mention)
    command = PROGRAMS[program]
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known


def test_commands_are_found_in_every_place() -> None:
    assert {words[0] for _, words in COMMANDS} == {"fot", "ray"}
    assert {"serve", "heal", "api"} <= {words[1] for _, words in [*of_images(), *of_containers()]}
    told = {words[1] for words in [*map(str.split, MENTIONED), *(words for _, words in of_the_page())]}
    assert {"up", "down", "status", "heal", "verify", "token", "ingest"} <= told


def test_variables_of_containers_mean_something() -> None:
    text = "\n".join(path.read_text() for path in DEPLOY.rglob("*.yaml"))
    text = re.sub(r"\$\{\w+", "", text)  # Compose's own.
    used = set(re.findall(r"\bFOT_[A-Z_]+[A-Z]\b", text + DOCKERFILE))
    assert used
    assert used <= set(known_variables())


def test_the_ray_service_deploys_what_is_there_with_settings_that_exist(tmp_path: Path) -> None:
    text = loaded("kubernetes/model_worker/ray_service.yaml")["spec"]["serveConfigV2"]
    config = yaml.safe_load(text.replace("/run/secrets", str(tmp_path)))
    for name in re.findall(rf"{tmp_path}/(\S+)", str(config).replace("'", " ")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Serve's models are of an older pydantic.
        from ray.serve import Application
        from ray.serve.schema import ServeDeploySchema

        given = ServeDeploySchema.model_validate(config)
        for one in given.applications:
            module, _, name = one.import_path.partition(":")
            assert isinstance(getattr(importlib.import_module(module), name)(one.args), Application)
