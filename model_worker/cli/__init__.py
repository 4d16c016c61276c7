"""The worker's commands of `fot`: ingest documents, ask them, generate, see what was attended, train, measure.

`fot` finds `register` by the entry point group "fot.commands". A command's module is light: what it needs of torch's
neighbours is imported when the command runs, so that the rest of `fot` stays fast and works without them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import typer

from memory_service.errors import FailedPrecondition

EXTRA = ("transformers", "tokenizers", "datasets", "pyarrow", "matplotlib")

P = ParamSpec("P")
Answer = TypeVar("Answer")


def register(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the worker's commands to `fot` and its measurements to `fot bench`."""
    from model_worker.cli import evaluate, memory_cluster, passkey, train
    from model_worker.cli.api import api
    from model_worker.cli.ask import ask
    from model_worker.cli.attention import attention
    from model_worker.cli.bench import decode, ingest_ray, prefill, serving
    from model_worker.cli.generate import generate
    from model_worker.cli.ingest import ingest

    app.command("ingest")(needs_worker(ingest))
    app.command("ask")(needs_worker(ask))
    app.command("generate")(needs_worker(generate))
    app.command("attention")(needs_worker(attention))
    app.command("api")(needs_worker(api, (*EXTRA, "fastapi", "uvicorn"), "worker,serving"))
    for room in (train, passkey, evaluate):
        room.register(app)
    memory_cluster.register(app)
    bench.command("prefill")(needs_worker(prefill))
    bench.command("decode")(needs_worker(decode))
    bench.command("serving")(needs_worker(serving))
    bench.command("ingest-ray")(needs_worker(ingest_ray))


def needs_worker(
    command: Callable[P, Answer], modules: tuple[str, ...] = EXTRA, extra: str = "worker"
) -> Callable[P, Answer]:
    """The command, refused with a sentence where the extra that brings `modules` is not installed."""

    @functools.wraps(command)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Answer:
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            raise FailedPrecondition(
                f"this command needs {', '.join(missing)}: pip install 'fot-memory[{extra}]'", reason="EXTRA_MISSING"
            )
        return command(*args, **kwargs)

    return checked
