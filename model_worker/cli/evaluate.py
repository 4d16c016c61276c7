"""`fot eval …`: studies of what a model makes of its memory. Each prints a table; JSON and a plot where asked.

Every study takes the same options for the model, the memory and the files; they are described once, in `Shared`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from memory_service.errors import InvalidArgument
from model_worker.cli import evaluate_dictionary, needs_worker
from model_worker.cli.crew import Address, CpusPerWorker, OnRay, Workers, check_alone
from model_worker.cli.evaluate_job import COMPARING, StudyJob
from model_worker.cli.evaluate_progress import StudyProgress
from model_worker.cli.opening import IN_MEMORY, tls_of
from model_worker.cli.options import (
    Ca,
    EngineName,
    Insecure,
    MemLayers,
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
    from model_worker.evaluation.report import Report

REFERENCE, LOOKUP = "reference", "lookup"


@dataclass(frozen=True, slots=True)
class Shared:
    """The options of every study."""

    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="A directory with a checkpoint, or a model that comes with fot."),
    ]
    memory: StudyTarget
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=0, help="Keys a query attends to; 0: every key. By default as the study says."),
    ]
    engine: EngineName
    search: Search
    mem_layers: MemLayers
    window: Window
    threads: Threads
    seed: Annotated[int, typer.Option(help="The same seed asks the same questions.")]
    json: JsonFile
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it here, a PNG.")]
    token_file: TokenFile
    ca: Ca
    insecure: Insecure

    ray: OnRay
    address: Address
    workers: Workers
    cpus_per_worker: CpusPerWorker

    def run(self, study: str, most: int, /, **options: Any) -> Report:
        """The study of this name, with its own options; `most` keys of the memory are attended to, 0 for all."""
        from model_worker.evaluation.place import Place
        from model_worker.evaluation.subject import Settings
        from model_worker.settings import Recall

        check_alone(self.ray, address=self.address, workers=self.workers, cpus_per_worker=self.cpus_per_worker)
        check_files(self.json, self.plot)
        if len(self.model) > 1 and study not in COMPARING:
            raise InvalidArgument("this study takes one --model; fot eval distraction compares several")
        settings = Settings(
            recall=Recall(top_k=most, engine=self.engine, search=search_of(self.search)),
            place=Place(self.memory, self.token_file, tls_of(self.ca, self.memory), self.insecure),
            mem_layers=layers_of(self.mem_layers),
            window=self.window,
        )
        job = StudyJob(study, tuple(self.model), settings, self.threads, {**options, "seed": self.seed})
        with StudyProgress(study) as tell:
            if self.ray:
                return job.run_on_ray(tell, self.address, self.workers, self.cpus_per_worker)
            return job.run_here(tell)

    def top(self, usual: int) -> int:
        """The k of the top k, as the caller or the study says."""
        return usual if self.top_k is None else self.top_k


_DEFAULTS: dict[str, Any] = {
    "memory": IN_MEMORY, "top_k": None, "engine": "auto", "seed": 0, "insecure": False, "ray": False,
}  # fmt: skip


def study(command: Callable[..., Report], model: str) -> Callable[..., None]:
    """A command from a study's own options: those of `Shared` are added, its report is shown, written and drawn.

    `model` is the one studied if none is named.
    """
    defaults = {**_DEFAULTS, "model": [model]}
    own = [one for one in inspect.signature(command).parameters.values() if one.name != "shared"]
    # A report is imported where a study runs: importing it takes torch.
    kinds = get_type_hints(command, localns={"Report": object}, include_extras=True)
    common = get_type_hints(Shared, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [one.replace(kind=keyword, annotation=kinds[one.name]) for one in own] + [
        inspect.Parameter(one.name, keyword, default=defaults.get(one.name), annotation=common[one.name])
        for one in fields(Shared)
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        shared = Shared(**{one.name: given.pop(one.name) for one in fields(Shared)})
        _tell(command(shared=shared, **given), shared)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def register(fot: typer.Typer) -> None:
    """Add `fot eval` and its studies."""
    app = typer.Typer(no_args_is_help=True, help="Study what a model makes of its memory.")
    for command in (needle, lookup, distraction, ruler, perplexity, dense, approximation):
        app.command(command.__name__)(needs_worker(study(command, LOOKUP if command is lookup else REFERENCE)))
    evaluate_dictionary.register(app)
    fot.add_typer(app, name="eval")


# --- The studies ----------------------------------------------------------------------------------------------------

Lengths = Annotated[str, typer.Option("--lengths", metavar="N[,N…]", help="Tokens in memory, such as 4K,16K,64K.")]
Haystacks = Annotated[str, typer.Option(help="keys, lookup, or both with a comma between.")]
Questions = Annotated[int, typer.Option(help="Questions over each memory.")]


def needle(
    shared: Shared,
    fillers: Annotated[
        str, typer.Option(help="Haystacks: landmark, text, code, random.")
    ] = "landmark,text,code,random",
    lengths: Lengths = "4K,16K,64K",
    trials: Annotated[int, typer.Option(help="Prompts of each haystack and length.")] = 10,
    depths: Annotated[int, typer.Option(help="Stretches of depth told apart.")] = 5,
) -> Report:
    """Pass keys at every depth of four kinds of haystack: a grid of depth and length; about two minutes."""
    return shared.run(
        "needle", shared.top(32), fillers=_words(fillers), lengths=sizes_of(lengths, "--lengths"), trials=trials,
        depths=depths,
    )  # fmt: skip


def lookup(
    shared: Shared,
    lengths: Lengths = "4K,16K,32K",
    questions: Questions = 100,
) -> Report:
    """UUID keys to UUID values in a JSON object (∞-Bench's Retrieve.KV), many keys over one memory; a minute."""
    return shared.run("lookup", shared.top(32), lengths=sizes_of(lengths, "--lengths"), questions=questions)


def distraction(
    shared: Shared,
    documents: Annotated[int, typer.Option(help="The most documents in memory, a power of two.")] = 64,
    tokens: Annotated[int, typer.Option(help="Of each document.")] = 512,
    kinds: Annotated[str, typer.Option(help="keys, text, or both with a comma between.")] = "keys,text",
) -> Report:
    """Attention mass on the right document among 1 to 64 (FoT's r_d); several --model are compared; a minute each."""
    return shared.run("distraction", shared.top(0), documents=documents, tokens=tokens, kinds=_words(kinds))


def ruler(
    shared: Shared,
    tasks: Annotated[str | None, typer.Option(help="Tasks with commas between; by default all.")] = None,
    lengths: Lengths = "4K,16K",
    samples: Annotated[int, typer.Option(help="Prompts of each task and length.")] = 5,
) -> Report:
    """RULER's synthetic tasks: needles, variable tracking, common and frequent words; share of answers found."""
    given = {} if tasks is None else {"tasks": _words(tasks)}
    return shared.run("ruler", shared.top(32), lengths=sizes_of(lengths, "--lengths"), samples=samples, **given)


def perplexity(
    shared: Shared,
    most: Annotated[int, typer.Option(help="The most files in memory.")] = 8,
    pieces: Annotated[int, typer.Option(help="Windows to predict.")] = 48,
    file_tokens: Annotated[int, typer.Option("--file-tokens", help="Tokens of a file that are remembered.")] = 4096,
) -> Report:
    """Predicting held-out code with 0 to N earlier files in memory, its own past, and unrelated files; a minute."""
    return shared.run("perplexity", shared.top(0), most=most, pieces=pieces, file_tokens=file_tokens)


def dense(
    shared: Shared,
    haystacks: Haystacks = "keys,lookup",
    lengths: Lengths = "4K,16K,64K",
    ks: Annotated[str, typer.Option("--ks", metavar="N[,N…]", help="The k of the top k.")] = "1,4,16,64,256",
    questions: Questions = 32,
) -> Report:
    """Attention to every key against exact top-k as the memory grows: accuracy and captured mass; two minutes."""
    return shared.run(
        "dense", shared.top(0), haystacks=_words(haystacks), lengths=sizes_of(lengths, "--lengths"),
        top_k=sizes_of(ks, "--ks"), questions=questions,
    )  # fmt: skip


def approximation(
    shared: Shared,
    haystacks: Haystacks = "keys,lookup",
    tokens: Annotated[str, typer.Option(help="In memory, such as 64K.")] = "64K",
    questions: Questions = 32,
    factories: Annotated[
        list[str] | None,
        typer.Option("--index", metavar="FACTORY", help="An index, as in IVF512,SQ8; may be given several times."),
    ] = None,
    probes: Annotated[str, typer.Option(metavar="N[,N…]", help="Lists visited of those that have some.")] = "1,4,16,64",
) -> Report:
    """Exact search against IVF, SQ8, PQ, RaBitQ and HNSW on the model's own keys; about three minutes."""
    top_k = shared.top(32)
    given = {} if factories is None else {"factories": tuple(factories)}
    return shared.run(
        "approximation", top_k, haystacks=_words(haystacks), tokens=_size(tokens), questions=questions, top_k=top_k,
        probes=sizes_of(probes, "--probes"), **given,
    )  # fmt: skip


# --- What they share ------------------------------------------------------------------------------------------------


def _size(text: str) -> int:
    sizes = sizes_of(text, "--tokens")
    if len(sizes) > 1:
        raise InvalidArgument(f"--tokens takes one length here, got {text!r}")
    return sizes[0]


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))


def _tell(report: Report, shared: Shared) -> None:
    """Show, write and draw what a study found."""
    from model_worker.evaluation.report import show

    job = import_module(f"model_worker.evaluation.{report.study}")
    deliver(report, shared.json, lambda: show(report, job.COLUMNS), (shared.plot, job.picture))
