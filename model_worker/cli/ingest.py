"""`fot ingest`: encode documents and store them in a memory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memory_service.errors import FotError, InvalidArgument
from model_worker.cli.console import counted, print_json, say
from model_worker.cli.crew import (
    Address,
    CpusPerWorker,
    GpusPerWorker,
    OnRay,
    Workers,
    WorkersRead,
    check_alone,
    check_shared,
)
from model_worker.cli.ingest_job import Job, OnCluster, Opening
from model_worker.cli.opening import checkpoint_of
from model_worker.cli.options import (
    NAME,
    TARGET,
    Ca,
    Device,
    Insecure,
    Json,
    MemDType,
    MemLayers,
    Model,
    ModelDType,
    Name,
    Target,
    Threads,
    TokenFile,
    Window,
    layers_of,
    metadata_of,
)
from model_worker.cli.progress import Progress
from model_worker.corpus import BadBytes, Choice, Columns, Format, Reading, corpus_bytes

if TYPE_CHECKING:
    from model_worker.ingestion.intake import IngestReport


def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files, directories and saved datasets.")],
    model: Model,
    target: Target = TARGET,
    name: Name = NAME,
    mem_layers: MemLayers = None,
    window: Window = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Tokens of left context a window sees again; by default 32.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to read files; auto goes by their suffix.")] = Format.AUTO,  # noqa: A002
    include: Annotated[
        list[str] | None, typer.Option(help="In directories, only files like this, as in '*.py' or 'docs/**/*.md'.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="In directories, no files like this.")] = None,
    text_field: Annotated[str, typer.Option(help="The field of a row's text.")] = "text",
    tokens_field: Annotated[str, typer.Option(help="The field of a row's token ids, if it has them.")] = "input_ids",
    id_field: Annotated[
        str | None, typer.Option(help="The field that names a row's document; by default file#number.")
    ] = None,
    fields: Annotated[
        list[str] | None, typer.Option("--field", help="A field to keep as metadata; by default all plain ones.")
    ] = None,
    bad_bytes: Annotated[BadBytes, typer.Option(help="For text that is not valid in its encoding.")] = BadBytes.REPLACE,
    prefix: Annotated[str, typer.Option(help="Begin every document's id with this, as in 'manual/'.")] = "",
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Keep this with every document.")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option(help="Begin a text as the tokenizer does, with <s> for example.")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Read so many documents and no more.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also replace documents of the same id that came from elsewhere.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove what earlier runs stored from these paths and is no longer there."),
    ] = False,
    mem_dtype: MemDType = None,
    dtype: ModelDType = None,
    device: Device = None,
    threads: Threads = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
    ray: OnRay = False,
    address: Address = None,
    workers: Workers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    workers_read: WorkersRead = False,
) -> None:
    """Encode documents and store them in a memory, which is made if there is none.

    Documents that are stored as they are now are skipped, changed ones are replaced, so a run that was stopped goes on
    when it is started again.
    """
    if prune and limit is not None:
        raise InvalidArgument("--prune would remove everything beyond --limit; give one of them")
    check_alone(
        ray, address=address, workers=workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker,
        workers_read=workers_read,
    )  # fmt: skip
    if ray:
        check_shared(target)
    choice = Choice(format, tuple(include or ()), tuple(exclude or ()))
    columns = Columns(text_field, tokens_field, id_field, None if fields is None else tuple(fields))
    opening = Opening(
        model, target, name, layers_of(mem_layers), window, overlap, mem_dtype, dtype, device, threads, token_file, ca,
        insecure,
    )  # fmt: skip
    reading = Reading(columns, bad_bytes, prefix, metadata_of(metadata))
    job = Job(paths, opening, choice, reading, limit, special_tokens, replace, prune)
    total = corpus_bytes(paths, choice)
    checkpoint_of(model)
    crew = OnCluster(address, workers, cpus_per_worker, gpus_per_worker, workers_read)
    with Progress(None if limit else total) as progress:
        try:
            report, made = job.run_on_ray(crew, progress) if ray else job.run_here(progress)
        except (FotError, OSError, KeyboardInterrupt):
            progress.close()
            if progress.begun:
                sys.stderr.write(
                    "fot: stopped; what this run stored stays "
                    f"({counted(progress.report.stored, 'document')}), and the same command goes on from there\n"
                )
            raise
    if json:
        print_json(_facts(report) | {"memory": made.name, "target": target, "memory_documents": made.documents})
        return
    _tell(report, name, made.documents)


def _facts(report: IngestReport) -> dict[str, object]:
    left_out = [one._asdict() for one in report.left_out]
    return asdict(report) | {"tokens_per_s": round(report.tokens_per_s, 1), "left_out": left_out}


def _tell(report: IngestReport, name: str, documents: int) -> None:
    parts = [f"{report.added:,} added", f"{report.replaced:,} replaced", f"{report.unchanged:,} unchanged"]
    parts += [f"{report.removed:,} removed"] if report.removed else []
    say(f"{', '.join(parts)}; memory {name} has {counted(documents, 'document')}.")
    if report.stored:
        say(f"{report.tokens:,} tokens in {report.seconds:,.1f} s, {report.tokens_per_s:,.0f} tokens/s.")
    for one in report.left_out:
        say(f"{counted(one.times, 'time')}: {one.why}, as {one.first}.")
