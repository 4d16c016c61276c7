"""`fot passkey`: hide keys in prompts of any length, and count how many the model finds through its memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memory_service import DType, Engine, FailedPrecondition
from memory_service.errors import InvalidArgument
from model_worker.cli.opening import IN_MEMORY, PATIENCE_S, checkpoint_of, load_tokenizer, quiet, tls_of
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
from model_worker.cli.reports import JsonFile, StudyTarget, check_files, deliver

if TYPE_CHECKING:
    from memory_service.client import Client
    from model_worker.evaluation.asking import Asking
    from model_worker.evaluation.report import Report
    from model_worker.settings import FotConfig

REFERENCE = "reference"
TOKENS, TRIALS, DEPTHS, TOP_K = 262_144, 20, 10, 32
LONG_S = 1800.0  # Of a call to the memory: exact attention to ten million tokens may take minutes on a busy machine.


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
) -> None:
    """Find passkeys in long prompts through the memory: accuracy by length and depth, speed and size.

    By default 20 prompts of 262,144 tokens through the reference model, with a memory in this process.
    """
    if require is not None and not 0 <= require <= 1:
        raise InvalidArgument(f"--require is an accuracy from 0 to 1, got {require:g}")
    from model_worker.evaluation import passkey as job
    from model_worker.evaluation.asking import MemoryAsker
    from model_worker.evaluation.questions import Wording
    from model_worker.tasks.fillers import Filler
    from model_worker.tasks.tokens import tokens_of

    plan = job.Plan(
        lengths=sizes_of(lengths if lengths is not None else tokens, "--tokens" if lengths is None else "--lengths"),
        trials=trials,
        depths=min(DEPTHS, trials) if depths is None else depths,
        wording=_one_of(Wording, question, "--question"),
        distractors=distractors,
        filler=_one_of(Filler, filler, "--filler"),
        seed=seed,
    )
    asking = _asking(store, top_k, engine, search, index)
    check_files(json, plot)
    directory = checkpoint_of(model)
    tokenizer = tokens_of(load_tokenizer(directory))
    with ExitStack() as opened:
        client = opened.enter_context(_client(memory, token_file, ca, insecure))
        base, fot = _model(directory, layers_of(mem_layers), dtype, device, threads, memory)
        given = {
            "mem_dtype": mem_dtype, "window": window, "last_context_length": last_context, "overlap": overlap,
            "block_tokens": block_tokens,
        }  # fmt: skip
        fot = replace(fot, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        questions = plan.questions(tokenizer, fot.last_context_length)
        asker = MemoryAsker(base, fot, client, asking)
        settings = {
            "model": model, "memory": memory, **asdict(asking), "mem_layers": fot.mem_layers, "window": fot.window,
            "last_context_length": fot.last_context_length, "overlap": fot.overlap, "mem_dtype": fot.mem_dtype,
            "block_tokens": fot.block_tokens, "dtype": str(base.dtype).removeprefix("torch."),
        }  # fmt: skip
        report = _watched(plan, questions, asker, settings)
    _tell(report, json, plot)
    if require is not None:
        _check(report, require)


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


def _client(target: str, token_file: Path | None, ca: Path | None, insecure: bool) -> Client:
    """The place of the memories; asked once, so that nothing is computed for one that does not answer."""
    from memory_service.client import Client

    def opened(timeout_s: float) -> Client:
        tls = tls_of(ca, target)
        return Client.open(target, token=token_file, tls=tls, insecure=insecure, timeout_s=timeout_s)

    if target != IN_MEMORY:
        with opened(PATIENCE_S) as asked:
            asked.stats()
    return opened(LONG_S)


def _model(
    directory: Path,
    layers: tuple[int, ...] | None,
    dtype: DType | None,
    device: str | None,
    threads: int | None,
    memory: str,
) -> tuple[Any, FotConfig]:
    """The checkpoint's model, and what it says of its memory."""
    import torch

    from model_worker.fitting import config_of
    from model_worker.hf import checkpoint

    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    base, fields = checkpoint.load(directory, dtype=None if dtype is None else dtype.torch, device=device)
    fot = config_of(base, fields)
    if layers is not None:
        fot = replace(fot, mem_layers=layers)
    if not fot.mem_layers:
        raise InvalidArgument(
            f"{directory} does not say which of its layers have a memory, and without one nothing is remembered: "
            "give --mem-layers"
        )
    return base, fot


def _watched(plan: Any, questions: Any, asker: Any, settings: dict[str, Any]) -> Report:
    from model_worker.cli.passkey_progress import PasskeyProgress
    from model_worker.evaluation import passkey as job

    with PasskeyProgress(plan.trials * len(plan.lengths), plan.tokens) as progress:
        return job.run(plan, questions, asker, progress, settings)


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
