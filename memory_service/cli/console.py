"""What commands share: where the memory is, tables for people, JSON for machines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memory_service.settings import ServerSettings, StoreOptions

if TYPE_CHECKING:
    from memory_service.client import Client, Tls

TARGET = f"grpc://{ServerSettings.model_fields['listen'].default}"
PATIENCE_S = 30.0
UNWATCHED_COLUMNS = 1000

Target = Annotated[
    str,
    typer.Option("--target", "-t", envvar="FOT_TARGET", help="A directory, grpc://host:port, grpcs://… or unix:/path."),
]
TokenFile = Annotated[
    Path | None, typer.Option(envvar="FOT_TOKEN_FILE", help="A file that holds the token; or set FOT_TOKEN.")
]
Ca = Annotated[Path | None, typer.Option(envvar="FOT_CA", help="The authority to trust with grpcs://.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Send the token unencrypted to another machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def connect(
    target: str,
    token_file: Path | None,
    ca: Path | None,
    insecure: bool,
    create: bool = False,
    snapshots: Path | None = None,
) -> Client:
    """Open the target a command names; only `create` makes a directory that is not there.

    A directory keeps its snapshots in `snapshots`, or in itself.
    """
    from memory_service.client import Client  # Loads torch: fot --help does not wait for it.

    tls = tls_of(ca, target)
    here = "://" not in target and not target.startswith("unix:")
    # A command that looks at a directory does not start to build indexes there.
    options = StoreOptions(background=False, snapshots=snapshots) if here else None
    return Client.open(
        target, token=token_file, tls=tls, insecure=insecure, timeout_s=PATIENCE_S, options=options, create=create
    )


def tls_of(ca: Path | None, target: str) -> Tls | None:
    """What to trust, where the target may speak TLS: --ca may stand in the environment for other targets."""
    from memory_service.client import Tls

    speaks = "://" in target and not target.startswith("grpc://")
    return Tls(ca=ca) if ca is not None and speaks else None


def console() -> Console:
    """Standard output; as wide as its lines where nobody looks, so that pipes get whole lines."""
    watched = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(soft_wrap=True, highlight=False, width=None if watched else UNWATCHED_COLUMNS)


def print_json(value: Any) -> None:
    """One JSON document on standard output; dataclasses become objects."""
    json.dump(value, sys.stdout, default=_plain, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """A table; columns whose names end in a space are aligned to the right. `empty` is said if there are no rows."""
    table = Table(title=title or None, title_justify="left", title_style="bold", header_style="dim", box=None)
    table.pad_edge = False
    for column in columns:
        table.add_column(column.strip(), justify="right" if column.endswith(" ") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    if table.row_count:
        _show(table)
    else:
        say(empty)


def print_facts(title: str, facts: Sequence[tuple[str, object]]) -> None:
    """Names and values below each other."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(escape(str(name)), escape(str(value)))
    _show(table)


def _show(table: Table) -> None:
    # Rich fills the last column with spaces.
    view = console()
    with view.capture() as captured:
        view.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def say(sentence: str) -> None:
    """One line that reports what was done."""
    console().print(escape(sentence))


def sure(question: str, yes: bool) -> None:
    """Ask before something is lost; leaves with code 1 unless the answer is yes."""
    if not yes:
        typer.confirm(question, abort=True)


def counted(number: int, noun: str) -> str:
    """1 document, 2 documents, 2 memories."""
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"


def size(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def when(seconds: float) -> str:
    """A moment in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, StrEnum | Path) else asdict(value)
