"""`fot eval dictionary`: look-up in dictionaries of up to 16M tokens and more, exactly and through indexes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_worker.cli import needs_worker
from model_worker.cli.crew import (
    Address,
    CpusPerWorker,
    OnRay,
    address_of,
    check_alone,
    check_own_or_shared,
    model_of,
    token_of,
)
from model_worker.cli.evaluate_job import alone
from model_worker.cli.evaluate_progress import StudyProgress
from model_worker.cli.opening import IN_MEMORY, checkpoint_of, quiet, tls_of
from model_worker.cli.options import Ca, Insecure, Threads, TokenFile, sizes_of
from model_worker.cli.reports import JsonFile, StudyTarget, check_files, deliver

if TYPE_CHECKING:
    from model_worker.evaluation.place import Place
    from model_worker.evaluation.report import Report
    from model_worker.evaluation.subject import Tell

MODEL = "dictionary"


def register(app: typer.Typer) -> None:
    """Add `dictionary` to `fot eval`."""
    app.command("dictionary")(needs_worker(dictionary))


def dictionary(
    sizes: Annotated[str, typer.Option(metavar="N[,N…]", help="Tokens of definitions: 4K,64K,1M,16M.")] = "4K,64K,1M",
    questions: Annotated[int, typer.Option(help="At each size, rounded up to whole windows.")] = 550,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help="exact, dense, or faiss:FACTORY as in faiss:IVF4096,SQ8, if need be with ?nprobe=16&candidates=64; "
            "may be given several times. By default exact and faiss:auto.",
        ),
    ] = None,
    probes: Annotated[
        str, typer.Option(metavar="N[,N…]", help="Lists visited, for indexes that do not say behind a ?.")
    ] = "4,16,64",
    model: Annotated[
        str, typer.Option("--model", "-m", help="A directory with a checkpoint, or one that comes with fot.")
    ] = MODEL,
    memory: StudyTarget = IN_MEMORY,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Keys a query attends to.")] = 32,
    greedy: Annotated[bool, typer.Option("--greedy", help="Also let the model go on from its own answers.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed makes the same dictionary and questions.")] = 0,
    threads: Threads = None,
    json: JsonFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw records right by size here, a PNG.")] = None,
    plot_search: Annotated[
        Path | None, typer.Option("--plot-search", help="Draw recall by time of the largest size here, a PNG.")
    ] = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    ray: OnRay = False,
    address: Address = None,
    cpus_per_worker: CpusPerWorker = None,
) -> None:
    """FoT's dictionary look-up against memory size, exact and through Faiss indexes.

    Up to 1M tokens in a few minutes; 16M take an hour and 13 GB of RAM.
    """
    from model_worker.evaluation import dictionary as job
    from model_worker.evaluation.dictionary_memory import PATIENCE_S
    from model_worker.evaluation.place import Place
    from model_worker.evaluation.report import show

    check_alone(ray, address=address, cpus_per_worker=cpus_per_worker)
    check_files(json, plot, plot_search)
    checkpoint_of(model)
    place = Place(memory, token_file, tls_of(ca, memory), insecure, PATIENCE_S)
    options = {
        "sizes": sizes_of(sizes, "--sizes"), "questions": questions, "engines": engine or job.ENGINES,
        "probes": sizes_of(probes, "--probes"), "top_k": top_k, "greedy": greedy, "seed": seed,
    }  # fmt: skip
    with StudyProgress("dictionary") as tell:
        if ray:
            check_own_or_shared(memory)
            place = replace(place, token=token_of(token_file))
            study = partial(_study, model_of(model), place, threads, options)
            report = alone(study, tell, address_of(address, memory), cpus_per_worker)
        else:
            report = _study(model, place, threads, options, tell)
    deliver(report, json, lambda: show(report, job.COLUMNS), (plot, job.picture), (plot_search, job.search_picture))


def _study(model: str, place: Place, threads: int | None, options: Mapping[str, Any], tell: Tell) -> Report:
    import torch

    from model_worker.evaluation import dictionary as job
    from model_worker.evaluation.dictionary_memory import Player

    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    return job.run(Player.open(checkpoint_of(model)), place, **options, tell=tell)
