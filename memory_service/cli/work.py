"""`fot memory index`, `compact` and `verify`: long work on one memory, watched until it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from memory_service.cli.console import TARGET, Ca, Insecure, Json, Target, TokenFile, connect, print_json, say
from memory_service.errors import FailedPrecondition
from memory_service.types.operations import Operation, OperationKind, OperationState

Name = Annotated[str, typer.Argument(help="The memory's name.")]
POLL_S = 0.2


def index(
    name: Name,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    factory: Annotated[
        str, typer.Option(help="Index everything anew with this Faiss factory, or auto; by default only what is new.")
    ] = "",
    json: Json = False,
) -> None:
    """Build the index of all committed tokens now, and wait until it is done."""
    _work(OperationKind.INDEX, name, target, token_file, ca, insecure, json, factory)


def compact(
    name: Name,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Rewrite segments without deleted documents now, and wait until it is done."""
    _work(OperationKind.COMPACT, name, target, token_file, ca, insecure, json)


def verify(
    name: Name,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Read every stored byte against its checksum while the memory is served; fails if any is damaged."""
    _work(OperationKind.VERIFY, name, target, token_file, ca, insecure, json)


def _work(
    kind: OperationKind,
    name: str,
    target: str,
    token_file: Path | None,
    ca: Path | None,
    insecure: bool,
    json: bool,
    factory: str = "",
) -> None:
    with connect(target, token_file, ca, insecure) as client:
        memory = client.memory(name)
        ended = watched(memory.start(kind, factory=factory), memory.operation)
    tell(ended, json)


def watched(operation: Operation, look: Callable[[str], Operation]) -> Operation:
    """The operation once it has ended; a bar on standard error tells how far it is."""
    columns = (TextColumn(operation.kind), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        while operation.state is OperationState.RUNNING:
            bar.update(task, completed=operation.done, total=operation.total or None)
            time.sleep(POLL_S)
            operation = look(operation.id)
    return operation


def tell(ended: Operation, json: bool) -> None:
    """How an operation ended; what did not is an error, or exit code 1 beside the JSON."""
    if json:
        print_json(ended)
        if ended.state is not OperationState.DONE:
            raise typer.Exit(1)
    elif ended.state is OperationState.DONE:
        say(f"{ended.message[:1].upper()}{ended.message[1:]}.")
    else:
        raise FailedPrecondition(f"the {ended.kind} of memory {ended.memory} {ended.state}: {ended.message}")
