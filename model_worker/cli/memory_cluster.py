"""`fot up` and `fot down`: a memory over the nodes of a Ray cluster. `fot status -t ray://NAME` tells how it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from memory_service.errors import InvalidArgument
from model_worker.cli.console import counted, print_json, say

if TYPE_CHECKING:
    from model_worker.deployment.plan import ClusterState, Plan

Cluster = Annotated[str, typer.Option("--name", "-n", help="The cluster's name: its target is ray://NAME.")]
Address = Annotated[
    str | None,
    typer.Option(help="The Ray cluster; by default RAY_ADDRESS, else one on this machine, started if needed."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def up(
    ray: Annotated[bool, typer.Option("--ray", help="Ray supervises the services.")] = False,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Between how many services documents are shared out.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Services that hold the same; by default 2 where there are 2 nodes.")
    ] = None,
    name: Cluster = "fot",
    address: Address = None,
    data: Annotated[
        str | None,
        typer.Option(help="A directory on every node, by default ~/.local/share/fot; {node} in it is the node's name."),
    ] = None,
    snapshots: Annotated[
        Path | None,
        typer.Option(
            envvar="FOT_STORE__SNAPSHOTS", help="Where snapshots are kept: a directory that all nodes share, as NFS."
        ),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="The file that fot token keeps, at this path on every node.")
    ] = None,
    token_file: Annotated[
        list[Path] | None, typer.Option(help="An admin's token, at this path on the head; once for every tenant.")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM certificate chain, on every node.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate, on every node.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM authority that clients' certificates need.")] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM authority to trust, on the head.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other machines without TLS or tokens.")] = False,
    gpus: Annotated[float | None, typer.Option(min=0, help="Ray's GPUs for each service, as 0.5.")] = None,
    replace_after: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which a copy whose node is gone is made anew elsewhere; 30."),
    ] = None,
    give_up: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARD",
            help="A shard whose data is gone for good, as s1: it begins again with its newest snapshots, or empty.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when all is there and moved.")] = True,
    timeout: Annotated[float | None, typer.Option("--timeout-s", min=0, help="The longest to wait.")] = None,
    json: Json = False,
) -> None:
    """Run a memory as SHARDS x REPLICAS services on a Ray cluster; with another number of shards, change a running one.

    What is not said stays as it is. Settings of fot serve in the environment (fot settings lists them) hold for the
    services.
    """
    if not ray:
        raise InvalidArgument("say who supervises the services: fot up --ray. For Kubernetes see deploy/")
    from model_worker.deployment import memory_cluster
    from model_worker.deployment.plan import Security

    paths = {"tls_certificate": tls_certificate, "tls_key": tls_key, "tls_client_ca": tls_client_ca, "ca": ca}
    given = {one: str(path.absolute()) for one, path in (paths | {"tokens": tokens}).items() if path is not None}
    security = Security(**given, token_files=tuple(str(one.absolute()) for one in token_file or ()), insecure=insecure)
    numbers = [_shard(one) for one in give_up or ()]
    memory_cluster.join(address, lambda: _tell("starting Ray on this machine"))
    plan = memory_cluster.plan_of(
        name,
        os.environ,
        shards=shards,
        replicas=replicas,
        data=None if data is None else data if data.startswith("~") else str(Path(data).absolute()),
        snapshots=None if snapshots is None else str(snapshots.absolute()),
        security=None if security == Security() else security,
        gpus=gpus,
        replace_after_s=replace_after,
    )
    memory_cluster.bring_up(plan, numbers)
    state = _watched(plan, timeout) if wait else memory_cluster.state_of(name)
    if json:
        print_json(state)
        return
    if not wait:
        say(f"ray://{name} is starting: fot status --target ray://{name}")
        return
    say(f"ray://{name} is up: {counted(state.shards, 'shard')} of {counted(plan.replicas, 'replica')}")
    for one in state.copies:
        if one.report is not None:
            say(f"  {one.copy}  {one.report.address}  on {one.report.node_name}, {one.report.directory}")


def down(
    name: Cluster = "fot",
    address: Address = None,
    delete_data: Annotated[bool, typer.Option("--delete-data", help="Delete what its services stored.")] = False,
) -> None:
    """Stop a memory's services, and the Ray that fot up started for it. Their data stays for the next fot up."""
    from model_worker.deployment import connection, memory_cluster

    connection.connect(address)
    ended = memory_cluster.take_down(name, delete_data)
    say(f"ray://{name} is down{' and deleted' if delete_data else ''}{'; Ray too' if ended else ''}")


def register(app: typer.Typer) -> None:
    """Add the commands to `fot`."""
    app.command("up")(up)
    app.command("down")(down)


def _watched(plan: Plan, timeout_s: float | None) -> ClusterState:
    """Wait until the cluster is as wanted, and tell what it is busy with."""
    from model_worker.deployment import memory_cluster

    said = ""
    with Console(stderr=True).status(f"ray://{plan.name}") as shown:
        for state in memory_cluster.watch(plan.name, timeout_s):
            line = memory_cluster.told(state)
            shown.update(line)
            if line != said and not sys.stderr.isatty():
                _tell(line)
            said = line
    return state


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _shard(text: str) -> int:
    if not (text.startswith("s") and text[1:].isdecimal()):
        raise InvalidArgument(f"--give-up takes a shard as fot status names it, such as s1; got {text!r}")
    return int(text[1:])
