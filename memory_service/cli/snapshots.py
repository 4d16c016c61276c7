"""`fot snapshot`: keep memories as they are at a moment, list what is kept, make memories of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memory_service.cli.cluster import caretaker
from memory_service.cli.console import (
    TARGET,
    Ca,
    Insecure,
    Json,
    Target,
    TokenFile,
    Yes,
    connect,
    counted,
    print_json,
    print_table,
    say,
    size,
    sure,
    when,
)
from memory_service.cli.work import tell, watched
from memory_service.types.operations import OperationState
from memory_service.types.snapshots import Snapshot

app = typer.Typer(no_args_is_help=True, help="Keep memories as snapshots, and make memories of them again.")

Id = Annotated[str, typer.Argument(help="The snapshot's id.")]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--snapshots",
        envvar="FOT_STORE__SNAPSHOTS",
        help="Of a directory as target: where its snapshots are, if not in it.",
    ),
]


@app.command("create")
def create(
    memory: Annotated[str, typer.Argument(help="The memory's name.")],
    snapshot: Annotated[
        str | None, typer.Option("--id", help="The snapshot's id, for retries; by default the time.")
    ] = None,
    snapshots: Directory = None,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Keep a memory as it is now, and wait until that is done."""
    with connect(target, token_file, ca, insecure, snapshots=snapshots) as client:
        ended = watched(client.memory(memory).snapshot(snapshot), client.operation)
    tell(ended, json)


@app.command("list")
def list_(
    memory: Annotated[str, typer.Argument(help="Of this memory alone, whether it is still there or not.")] = "",
    snapshots: Directory = None,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """List snapshots."""
    with connect(target, token_file, ca, insecure, snapshots=snapshots) as client:
        found = list(client.snapshots(memory))
    if json:
        print_json(found)
        return
    rows = [
        (one.id, one.memory, when(one.created_at), f"{one.documents:,}", f"{one.tokens:,}", size(one.bytes), _note(one))
        for one in found
    ]
    columns = ("snapshot", "memory", "taken", "documents ", "tokens ", "size ", "")
    print_table("", columns, rows, "No snapshots yet: fot snapshot create.")


@app.command("restore")
def restore(
    snapshot: Id,
    name: Annotated[str, typer.Option("--as", help="The new memory's name; by default the one it had.")] = "",
    snapshots: Directory = None,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Make a new memory of a snapshot once every byte was checked, and wait until that is done."""
    from memory_service.places.targets import is_cluster  # Loads torch: fot --help does not wait for it.

    with connect(target, token_file, ca, insecure, snapshots=snapshots) as client:
        ended = watched(client.restore(snapshot, name), client.operation)
    if ended.state is OperationState.DONE and is_cluster(target):
        # Replicas that did not see the snapshot get the documents from those that did.
        with caretaker(target, token_file, ca, insecure) as keeper:
            keeper.heal()
    tell(ended, json)


@app.command("delete")
def delete(
    snapshot: Id,
    snapshots: Directory = None,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    yes: Yes = False,
) -> None:
    """Delete a snapshot; memories and other snapshots keep what they share with it."""
    with connect(target, token_file, ca, insecure, snapshots=snapshots) as client:
        one = client.snapshot(snapshot)
        held = (
            f"{counted(one.documents, 'document')} of memory {one.memory}" if one.memory else "nothing that is readable"
        )
        sure(f"Delete snapshot {snapshot} with {held}?", yes)
        client.delete_snapshot(snapshot)
    say(f"Deleted snapshot {snapshot}.")


def _note(one: Snapshot) -> str:
    if one.missing:
        return f"lacks shard {', '.join(one.missing)}"
    return f"damaged: {one.problem}" if one.problem else ""
