"""`fot stats`: figures of one memory, or of all."""

from __future__ import annotations

from typing import Annotated

import typer

from memory_service.cli.console import (
    TARGET,
    Ca,
    Insecure,
    Json,
    Target,
    TokenFile,
    connect,
    counted,
    print_facts,
    print_json,
    size,
)
from memory_service.types.memories import Stats
from memory_service.verbs import GetStats


def stats(
    memory: Annotated[str, typer.Argument(help="A memory's name; all together without one.")] = "",
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Show figures of storage, residency, index and sessions."""
    with connect(target, token_file, ca, insecure) as client:
        found = client.run(GetStats(memory))
    if json:
        print_json(found)
    else:
        print_facts(f"Memory {memory}" if memory else "All memories", _facts(found))


def _facts(found: Stats) -> list[tuple[str, object]]:
    return [
        ("documents", f"{found.documents:,}"),
        ("tokens", f"{found.tokens:,}"),
        ("stored", f"{size(found.bytes)} in {counted(found.segments, 'segment')}"),
        ("dead", f"{size(found.dead_bytes)}, until compaction"),
        ("in RAM", f"{size(found.resident_bytes)}, {found.resident_tokens:,} tokens"),
        ("indexed", f"{found.indexed_tokens:,} of {found.tokens:,} tokens, {size(found.index_bytes)}"),
        ("sessions", f"{found.sessions:,}, {size(found.session_bytes)}"),
    ]
