"""`fot bench`: measure this machine, with the environment saved beside the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from memory_service.bench.harness import Result

app = typer.Typer(no_args_is_help=True, help="Measure attention, ingest and the wire on this machine.")

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write all rows and the environment here.")]
Directory = Annotated[Path | None, typer.Option(help="Measure on this disk; by default the temporary one.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Seconds instead of minutes, to see that it works; the numbers mean nothing.")
]


@app.command("attend")
def attend(directory: Directory = None, quick: Quick = False, json: JsonFile = None) -> None:
    """Attention against Faiss and torch on the same keys, in process and over gRPC; about ten minutes."""
    # Imported when asked for: the benchmarks load Faiss.
    from memory_service.bench import attend as bench

    _finish(bench.run(directory=directory, quick=quick), bench.render, json)


@app.command("ingest")
def ingest(
    directory: Directory = None,
    size_mib: Annotated[int, typer.Option(min=1, help="Size of the large document.")] = 256,
    writers: Annotated[int, typer.Option(min=1, help="Writers of small documents at once.")] = 16,
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """Bytes to durable commit, against plain write and fsync on the same disk; about two minutes."""
    from memory_service.bench import ingest as bench

    result = bench.run(directory=directory, size_mib=size_mib, writers=writers, quick=quick)
    _finish(result, bench.render, json)


@app.command("wire")
def wire(quick: Quick = False, json: JsonFile = None) -> None:
    """Bytes a token on the wire, shipping queries against shipping keys and values; takes no time."""
    from memory_service.bench import wire as bench

    _finish(bench.run(quick=quick), bench.render, json)


def _finish(result: Result, render: Callable[[Result], None], file: Path | None) -> None:
    if file is not None:
        file.write_text(result.to_json() + "\n", encoding="utf-8")
    render(result)
