"""`fot passkey`: hide keys in prompts of any length, and count how many the model finds through its memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memory_service import Engine, FailedPrecondition
from memory_service.errors import InvalidArgument
from model_worker.cli.crew import (
    Address,
    CpusPerWorker,
    GpusPerWorker,
    OnRay,
    Workers,
    address_of,
    check_alone,
    check_own_or_shared,
    crew_of,
    device_of,
    model_of,
    token_of,
)
from model_worker.cli.opening import IN_MEMORY, checkpoint_of
from model_worker.cli.options import (
    Ca,
    Device,
    EngineName,
    Insecure,
    LastContext,
    MemDType,
    MemLayers,
    ModelDType,
    Search,
    Threads,
    TokenFile,
    Window,
    layers_of,
    search_of,
    sizes_of,
)
from model_worker.cli.passkey_job import Opening, open_parts
from model_worker.cli.passkey_progress import PasskeyProgress
from model_worker.cli.reports import JsonFile, StudyTarget, check_files, deliver

if TYPE_CHECKING:
    from model_worker.evaluation.asking import Asking
    from model_worker.evaluation.passkey import Plan
    from model_worker.evaluation.report import Report

REFERENCE = "reference"
TOKENS, TRIALS, DEPTHS, TOP_K = 262_144, 20, 10, 32


def register(app: typer.Typer) -> None:
    """Add `fot passkey`."""
    from model_worker.cli import needs_worker

    app.command("passkey")(needs_worker(passkey))


def passkey(
    tokens: Annotated[str, typer.Option(help="Tokens of a prompt: 262144, 256K, 1M, …")] = str(TOKENS),
    lengths: Annotated[
        str | None, typer.Option(metavar="N[,N…]", help="Several lengths instead, such as 16K,64K,256K.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Prompts of each length, each with its key at another depth.")] = TRIALS,
    depths: Annotated[int | None, typer.Option(help="Stretches of depth told apart; by default 10.")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A directory with a checkpoint, or a model that comes with fot.")
    ] = REFERENCE,
    memory: StudyTarget = IN_MEMORY,
    store: Annotated[
        str | None,
        typer.Option(help="Where a prompt goes: session, or documents, which an index can cover; by default session."),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Keys a query attends to; 0: every key.")] = TOP_K,
    engine: EngineName = "exact",
    search: Search = None,
    index: Annotated[
        str, typer.Option("--index", metavar="FACTORY", help="What --engine index builds, as in IVF512,Flat.")
    ] = "auto",
    distractors: Annotated[int, typer.Option(help="Documents beside each prompt, with keys of other labels.")] = 0,
    question: Annotated[
        str, typer.Option(help="plain: the pass key; labelled: a key with a label of its own.")
    ] = "plain",
    filler: Annotated[str, typer.Option(help="The haystack: landmark, text, code or random.")] = "landmark",
    seed: Annotated[int, typer.Option(help="The same seed asks the same prompts.")] = 0,
    require: Annotated[
        float | None, typer.Option(help="Exit with 1 if a length's accuracy is below this, 0 to 1.")
    ] = None,
    json: JsonFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw accuracy by length and depth here, a PNG.")] = None,
    mem_layers: MemLayers = None,
    mem_dtype: MemDType = None,
    window: Window = None,
    last_context: LastContext = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Tokens a window repeats of the one before; by default the checkpoint's.")
    ] = None,
    block_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the windows that load together.")] = None,
    dtype: ModelDType = None,
    device: Device = None,
    threads: Threads = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    ray: OnRay = False,
    address: Address = None,
    workers: Workers = None,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
) -> None:
    """Find passkeys in long prompts through the memory: accuracy by length and depth, speed and size.

    By default 20 prompts of 262,144 tokens through the reference model, with a memory in this process.
    """
    if require is not None and not 0 <= require <= 1:
        raise InvalidArgument(f"--require is an accuracy from 0 to 1, got {require:g}")
    from model_worker.evaluation import passkey as job
    from model_worker.evaluation.questions import Wording
    from model_worker.tasks.fillers import Filler

    plan = job.Plan(
        lengths=sizes_of(lengths if lengths is not None else tokens, "--tokens" if lengths is None else "--lengths"),
        trials=trials,
        depths=min(DEPTHS, trials) if depths is None else depths,
        wording=_one_of(Wording, question, "--question"),
        distractors=distractors,
        filler=_one_of(Filler, filler, "--filler"),
        seed=seed,
    )
    check_alone(ray, address=address, workers=workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)
    check_files(json, plot)
    given = {
        "mem_dtype": mem_dtype, "window": window, "last_context_length": last_context, "overlap": overlap,
        "block_tokens": block_tokens,
    }  # fmt: skip
    opening = Opening(
        model, memory, _asking(store, top_k, engine, search, index), layers_of(mem_layers), given, dtype, device,
        threads, token_file, ca, insecure,
    )  # fmt: skip
    checkpoint_of(model)
    with PasskeyProgress(plan.trials * len(plan.lengths), plan.tokens) as progress:
        if ray:
            report = _on_ray(plan, opening, progress, address, workers, cpus_per_worker, gpus_per_worker)
        else:
            with ExitStack() as opened:
                parts = opening.parts(plan, opened)
                report = job.run(plan, parts.questions, parts.asker, progress, parts.settings)
    _tell(report, json, plot)
    if require is not None:
        _check(report, require)


def _on_ray(
    plan: Plan,
    opening: Opening,
    progress: PasskeyProgress,
    address: str | None,
    workers: str | None,
    cpus: float | None,
    gpus: float | None,
) -> Report:
    from model_worker.deployment.runtime import connect

    check_own_or_shared(opening.memory)
    opening = replace(
        opening, model=model_of(opening.model), token=token_of(opening.token), device=device_of(opening.device, gpus)
    )
    with connect(address_of(address, opening.memory)) as cluster:
        from model_worker.deployment import trials

        crew = crew_of(workers, cpus, gpus, cluster, plan.trials * len(plan.lengths))
        make = partial(trials.PasskeyWorker, partial(open_parts, opening, plan))
        report = trials.run(plan, make, crew, cluster, progress)
    return replace(report, settings={**report.settings, "ray": crew.told(cluster)})


def _asking(store: str | None, top_k: int, engine: str, search: list[str] | None, index: str) -> Asking:
    from model_worker.evaluation.asking import Asking, Store

    # An index covers documents only, so who asks for one means them.
    chosen = Store.DOCUMENTS if engine == Engine.INDEX else Store.SESSION
    if store is not None:
        chosen = _one_of(Store, store, "--store")
    return Asking(chosen, top_k, engine, search_of(search), index)


def _one_of(kind: Any, word: str, option: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise InvalidArgument(f"{option} is one of {', '.join(kind)}, got {word!r}") from None


def _tell(report: Report, json: Path | None, plot: Path | None) -> None:
    from model_worker.evaluation import passkey as job
    from model_worker.evaluation.report import show

    deliver(
        report, json, lambda: show(report, job.columns(), job.title(report), sections="tokens"), (plot, job.picture)
    )


def _check(report: Report, require: float) -> None:
    """Raise FailedPrecondition if a length missed what was asked for."""
    from model_worker.evaluation.passkey import shares

    for tokens, share in shares(report).items():
        if share.value < require:
            raise FailedPrecondition(
                f"found {share.found} of {share.trials} keys in {tokens:,} tokens, an accuracy of {share.value:.4g}: "
                f"less than --require {require:g}"
            )
