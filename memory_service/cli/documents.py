"""`fot docs`: list, show and remove documents."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

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
    print_facts,
    print_json,
    print_table,
    say,
    sure,
    when,
)
from memory_service.types.documents import DocumentInfo

app = typer.Typer(no_args_is_help=True, help="List, show and remove documents.")

TABLE_ROWS = 1000
Name = Annotated[str, typer.Argument(help="The memory's name.")]
Where = Annotated[str | None, typer.Option(help="Only those whose metadata match, as in 'lang = py and year >= 2020'.")]


@app.command("ls")
def list_(
    memory: Name,
    where: Where = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many; by default 1000 in a table, all as JSON.")
    ] = None,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """List documents by id."""
    most = limit or (None if json else TABLE_ROWS)
    with connect(target, token_file, ca, insecure) as client:
        found = list(islice(client.memory(memory).documents(where), most and most + 1))
    documents, more = found[:most], most is not None and len(found) > most
    if json:
        print_json(documents)
        return
    rows = [(d.id, f"{d.tokens:,}", _metadata(d), when(d.committed_at)) for d in documents]
    nothing = f"No documents of {memory} match {where}." if where else f"Memory {memory} has no documents yet."
    print_table("", ("document", "tokens ", "metadata", "committed"), rows, nothing)
    if more:
        say(f"… and more; raise --limit above {most}, or narrow with --where.")


@app.command("show")
def show(
    memory: Name,
    document: Annotated[str, typer.Argument(help="The document's id.")],
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Show one document."""
    with connect(target, token_file, ca, insecure) as client:
        info = client.memory(memory).get(document)
    if json:
        print_json(info)
        return
    print_facts(
        f"Document {info.id}",
        [
            ("tokens", f"{info.tokens:,}"),
            ("generation", info.generation),
            ("committed", when(info.committed_at)),
            *sorted(info.metadata.items()),
        ],
    )


@app.command("rm")
def remove(
    memory: Name,
    documents: Annotated[list[str] | None, typer.Argument(help="Ids of documents.")] = None,
    where: Where = None,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    yes: Yes = False,
) -> None:
    """Remove documents, named by id or by their metadata."""
    if bool(documents) == bool(where):
        raise typer.BadParameter("name documents, or give --where, but not both")
    with connect(target, token_file, ca, insecure) as client:
        opened = client.memory(memory)
        doomed = documents or [document.id for document in opened.documents(where)]
        if not doomed:
            say(f"No documents of {memory} match {where}.")
            return
        sure(f"Remove {counted(len(doomed), 'document')} of memory {memory}?", yes)
        for document in doomed:
            opened.delete(document)
    say(f"Removed {counted(len(doomed), 'document')} of memory {memory}.")


def _metadata(document: DocumentInfo) -> str:
    # What `fot ingest` keeps to know a document again (hashes) would fill the screen; `fot docs show` tells it.
    shown = sorted((key, value) for key, value in document.metadata.items() if not key.startswith("fot."))
    return ", ".join(f"{key}={value}" for key, value in shown)
