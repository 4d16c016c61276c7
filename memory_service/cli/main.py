"""The command tree, and how every failure leaves it: one clear sentence on standard error.

Exit codes: 0 it worked, 1 it did not, 2 the command line was wrong, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from memory_service.cli import (
    bench,
    cluster,
    doctor,
    documents,
    memories,
    serve,
    snapshot_check,
    snapshots,
    tokens,
    verify,
    work,
)
from memory_service.cli.environment import check_environment
from memory_service.cli.stats import stats
from memory_service.errors import FotError

app = typer.Typer(
    name="fot",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A durable memory of attention keys and values that answers attention.",
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"fot {version('fot-memory')}\n")
        raise typer.Exit


@app.callback()
def _everywhere(
    told: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """A durable memory of attention keys and values that answers attention."""


app.command("serve")(serve.serve)
app.add_typer(memories.app, name="memory")
memories.app.command("index")(work.index)
memories.app.command("compact")(work.compact)
memories.app.command("verify")(work.verify)
app.add_typer(documents.app, name="docs")
app.add_typer(snapshots.app, name="snapshot")
snapshots.app.command("verify")(snapshot_check.verify)
app.add_typer(tokens.app, name="token")
app.command("stats")(stats)
app.command("status")(cluster.status)
app.command("heal")(cluster.heal)
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)
app.command("settings")(serve.settings)
app.add_typer(bench.app, name="bench")


def _add_commands_of_others() -> None:
    """Let installed packages add commands: each entry point of "fot.commands" is called with `fot` and `fot bench`."""
    for entry in entry_points(group="fot.commands"):
        try:
            entry.load()(app, bench.app)
        except ImportError as error:
            # A memory must be served even where the packages around it are broken.
            sys.stderr.write(f"fot: the commands of {entry.value} are missing: {error}\n")


_add_commands_of_others()


def main() -> None:
    """Run one command and exit."""
    try:
        check_environment()
        app()
    except FotError as error:
        sys.stderr.write(f"fot: {error.message}\n")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of a pipe had enough, as in `fot docs ls | head`; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.stderr.write(f"fot: {error.strerror or error}{f': {error.filename}' if error.filename else ''}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("FOT_DEBUG"):
            raise
        sys.stderr.write(f"fot: a defect of fot: {type(error).__name__}: {error} (FOT_DEBUG=1 tells more)\n")
        sys.exit(1)
