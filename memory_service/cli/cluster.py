"""`fot status` and `fot heal`: how a cluster is, and its replicas made equal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from memory_service.cli.console import TARGET, Ca, Insecure, Json, Target, TokenFile, print_json, print_table, say, size

if TYPE_CHECKING:
    from memory_service.cluster.caretaker import Caretaker
    from memory_service.cluster.status import ClusterStatus, ReplicaStatus


def status(
    target: Target = TARGET,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Compare replicas: lists all their documents.")
    ] = True,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Show a cluster's shards and replicas, what they hold and what they lack; exit code 1 if one is not whole."""
    with caretaker(target, token_file, ca, insecure) as keeper:
        found = keeper.status(compare)
    if json:
        print_json(found)
    else:
        _print(found)
    if not found.whole:
        raise typer.Exit(1)


def heal(
    target: Target = TARGET,
    every: Annotated[float | None, typer.Option(help="Seconds; heal again and again until interrupted.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take what is there for everything: the other replicas are gone for good.")
    ] = False,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Make the replicas of every shard equal, and let those that were away answer again. Safe while writes go on."""
    with caretaker(target, token_file, ca, insecure) as keeper:
        while True:
            found = keeper.heal(force=force)
            if json:
                print_json(found)
            else:
                say(f"copied {found.copied:,} documents ({size(found.bytes)}), deleted {found.deleted:,}")
                for address in found.away:
                    say(f"{address} does not answer")
                for address in found.behind:
                    say(f"{address} may still lack writes: nobody who surely has them is there")
            if every is None:
                break
            time.sleep(every)
    if found.away or found.behind:
        raise typer.Exit(1)


def caretaker(target: str, token_file: TokenFile, ca: Ca, insecure: bool) -> Caretaker:
    """The caretaker of a cluster's target, with the caller's own token."""
    from memory_service.client import Tls  # They load torch: fot --help does not wait for it.
    from memory_service.cluster.caretaker import Caretaker

    return Caretaker.open(target, tokens=(token_file,), tls=Tls(ca=ca) if ca else None, insecure=insecure)


def _print(found: ClusterStatus) -> None:
    rows = [
        (shard.id, _where(one), _state(one), f"{one.documents:,}", f"{one.tokens:,}", size(one.bytes), f"{one.lag:,}")
        for shard in found.shards
        for one in shard.replicas
    ]
    told = f"Epoch {found.epoch}{', documents are moving' if found.moving else ''}: {found.documents:,} documents"
    print_table(told, ("shard", "replica", "state", "documents ", "tokens ", "bytes ", "lacks "), rows, "no shards")
    for one in (one for shard in found.shards for one in shard.replicas if one.problem):
        say(f"{one.address}: {one.problem}")


def _where(one: ReplicaStatus) -> str:
    return f"{one.address} on {one.node}" if one.node else one.address


def _state(one: ReplicaStatus) -> str:
    if not one.up:
        return "down"
    return "behind" if one.behind else "up"
