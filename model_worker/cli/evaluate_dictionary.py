"""`fot eval dictionary`: look-up in dictionaries of up to 16M tokens and more, exactly and through indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model_worker.cli import needs_worker
from model_worker.cli.evaluate_progress import StudyProgress
from model_worker.cli.opening import IN_MEMORY, checkpoint_of, quiet, tls_of
from model_worker.cli.options import Ca, Insecure, Threads, TokenFile, sizes_of
from model_worker.cli.reports import JsonFile, StudyTarget, check_files, deliver

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
) -> None:
    """FoT's dictionary look-up against memory size, exact and through Faiss indexes.

    Up to 1M tokens in a few minutes; 16M take an hour and 13 GB of RAM.
    """
    import torch

    from model_worker.evaluation import dictionary as job
    from model_worker.evaluation.dictionary_memory import PATIENCE_S, Player
    from model_worker.evaluation.place import Place
    from model_worker.evaluation.report import show

    check_files(json, plot, plot_search)
    directory = checkpoint_of(model)
    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    place = Place(memory, token_file, tls_of(ca, memory), insecure, PATIENCE_S)
    with StudyProgress("dictionary") as tell:
        report = job.run(
            Player.open(directory), place, sizes=sizes_of(sizes, "--sizes"),
            questions=questions, engines=engine or job.ENGINES, probes=sizes_of(probes, "--probes"), top_k=top_k,
            greedy=greedy, seed=seed, tell=tell,
        )  # fmt: skip
    deliver(report, json, lambda: show(report, job.COLUMNS), (plot, job.picture), (plot_search, job.search_picture))
