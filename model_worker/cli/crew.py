"""The options of commands that can run on a Ray cluster, and what they stand for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memory_service.errors import InvalidArgument
from model_worker import reference
from model_worker.cli.opening import IN_MEMORY, checkpoint_of

if TYPE_CHECKING:
    from model_worker.deployment.pool import Crew
    from model_worker.deployment.runtime import Cluster

PANEL = "On a Ray cluster"

OnRay = Annotated[bool, typer.Option("--ray", help="Let workers on a Ray cluster do it.", rich_help_panel=PANEL)]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="The cluster's head, or auto for the one of this machine. By default RAY_ADDRESS, else a Ray of this "
        "machine for as long as the command runs.",
        rich_help_panel=PANEL,
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="MIN-MAX",
        help="How many, such as 4 or 2-8; by default 1 to as many as the cluster holds.",
        rich_help_panel=PANEL,
    ),
]
CpusPerWorker = Annotated[
    float | None, typer.Option("--cpus-per-worker", help="By default 1; also its threads.", rich_help_panel=PANEL)
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", help="By default 0; 0.5 lets two share a GPU.", rich_help_panel=PANEL),
]
WorkersRead = Annotated[
    bool,
    typer.Option(
        "--workers-read",
        help="Let workers read files of text themselves, where all nodes see the same files at the same paths.",
        rich_help_panel=PANEL,
    ),
]


def check_alone(ray: bool, **given: object) -> None:
    """Raise InvalidArgument for options of the workers where there are none."""
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if named and not ray:
        raise InvalidArgument(f"{', '.join(named)} is about workers on a cluster: give --ray too")


def check_shared(target: str) -> None:
    """Raise InvalidArgument for a memory that only one process could hold."""
    if "://" not in target:
        raise InvalidArgument(
            f"the workers of a cluster cannot share the memory {target!r}, which lives in one process: serve it with "
            "`fot serve` or `fot up` and name it with --memory grpc://host:port or ray://name"
        )


def check_own_or_shared(target: str) -> None:
    """Raise InvalidArgument for a directory: every worker may have a memory of its own, or all the same service."""
    if target != IN_MEMORY:
        check_shared(target)


def address_of(address: str | None, target: str = IN_MEMORY) -> str | None:
    """Which cluster to join; who names the memory of a cluster means that cluster."""
    if address is None and target.startswith("ray://") and not os.environ.get("RAY_ADDRESS"):
        return "auto"
    return address


def crew_of(
    workers: str | None, cpus: float | None, gpus: float | None, cluster: Cluster, tasks: int | None = None
) -> Crew:
    """How many workers there will be on this cluster; never more than `tasks`. Raises InvalidArgument."""
    from model_worker.deployment.pool import Crew

    cpus, gpus = 1.0 if cpus is None else cpus, gpus or 0.0
    if workers is not None:
        least, dash, highest = workers.partition("-")
        if not (least.isdecimal() and (highest.isdecimal() or not dash)):
            raise InvalidArgument(f"--workers takes a number such as 4, or two such as 2-8, got {workers!r}")
        return Crew(int(least), int(highest if dash else least), cpus, gpus)
    room = [have / each for have, each in ((cluster.cpus, cpus), (cluster.gpus, gpus)) if each]
    most = max(1, int(min(room, default=1)))
    return Crew(1, most if tasks is None else max(1, min(most, tasks)), cpus, gpus)


def device_of(device: str | None, gpus: float | None) -> str | None:
    """Where a worker's model computes: on the GPU it was given, unless told otherwise."""
    return "cuda" if device is None and gpus else device


def model_of(model: str | Path) -> str:
    """What every node calls the model: its name if it comes with the package, else its whole path.

    Raises InvalidArgument unless a checkpoint lies there on this machine.
    """
    directory = checkpoint_of(model)
    named = str(model) in reference.NAMES and not Path(model).is_dir()
    return str(model) if named else str(directory.resolve())


def token_of(token_file: str | Path | None) -> str | None:
    """The token itself: other nodes do not have the file. Raises InvalidArgument if it cannot be read."""
    named = (
        Path(token_file)
        if token_file
        else (Path(os.environ["FOT_TOKEN_FILE"]) if os.environ.get("FOT_TOKEN_FILE") else None)
    )
    if named is None:
        return os.environ.get("FOT_TOKEN")
    try:
        return named.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidArgument(f"the token file {named} cannot be read: {error.strerror}") from None
