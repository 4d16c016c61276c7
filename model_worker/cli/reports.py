"""How a study's report leaves a command: a table, or JSON on standard output, files and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from model_worker.evaluation.report import Report

STDOUT = Path("-")
Picture = tuple[Path | None, "Callable[[Report], Figure]"]  # Where to, if anywhere, and who draws it.

StudyTarget = Annotated[
    str,
    typer.Option("--memory", "--target", "-t", envvar="FOT_TARGET", help=":memory:, a directory, or grpc://host:port."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write figures, rows and where it ran here; - for standard output.")
]


def check_files(json: Path | None, *pictures: Path | None) -> None:
    """Raise InvalidArgument, before any work, for a file that cannot be written or is no PNG."""
    from model_worker.evaluation.report import check_file

    check_file(None if json == STDOUT else json)
    for picture in pictures:
        check_file(picture, ".png")


def deliver(report: Report, json: Path | None, show: Callable[[], None], *pictures: Picture) -> None:
    """Write the JSON, show the table unless JSON is shown, and draw the pictures."""
    if json == STDOUT:
        sys.stdout.write(report.to_json())
    else:
        show()
        if json is not None:
            report.save(json)
    for path, draw in pictures:
        if path is not None:
            # Matplotlib takes a second to import.
            from model_worker.evaluation.pictures import save

            save(draw(report), path)
            Console(stderr=True, highlight=False).print(f"wrote {path}", markup=False, soft_wrap=True)
