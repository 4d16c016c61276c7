"""`fot bench ingest-ray`: what workers on Ray add to an ingest, and what a second worker brings.

Contenders, taken in turns, each with the same documents, the same model and one thread:

    plain      `model_worker.ingestion.ingest.ingest` in this process
    1 worker   the same documents through one worker on a Ray of this machine
    2 workers  through two

All store by gRPC into a service in a process of its own, a new memory every time. Starting Ray and opening the models
is not counted, and every contender encodes some documents first that are not counted either. Figures: `ray_speedup_2`
is 1 worker's time over that of 2 (needs two free cores, and a third for the service if it is to be 2), `ray_overhead`
what 1 worker takes more than plain, as a share.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from memory_service import DType, IndexPolicy, Memory
from memory_service.bench.harness import Progress, Result, ratio, row, say, scratch, served, show, single_threaded
from memory_service.errors import Internal
from model_worker.bench.geometry import QUICK, Geometry
from model_worker.corpus import Notes, Reading, Source
from model_worker.decoder.fitting import spec_of
from model_worker.decoder.model import FotModel
from model_worker.deployment.ingest import IngestWorker, fill, in_batches
from model_worker.deployment.pool import Crew, Pool
from model_worker.deployment.runtime import Cluster, connect
from model_worker.ingestion.encoding import Encoder
from model_worker.ingestion.ingest import Parts, ingest
from model_worker.ingestion.intake import IngestReport, Ledger, settings_of

LAYER = 4
DOCUMENTS, TOKENS = 160, 2048  # A third of a million tokens.
WARMING = 16  # Documents that are not counted.
ROUNDS = 3
CONTENDERS = ("plain", "1 worker", "2 workers")


def run(
    *,
    documents: int = DOCUMENTS,
    tokens: int = TOKENS,
    rounds: int = ROUNDS,
    directory: Path | None = None,
    address: str | None = None,
    quick: bool = False,
    progress: Progress = say,
) -> Result:
    """Measure all contenders `rounds` times. Raises FailedPrecondition without Ray."""
    geometry = QUICK if quick else Geometry()
    if quick:
        documents, tokens, rounds = 24, 256, 1
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with (
        scratch(directory, "fot-ingest-ray-") as folder,
        served(folder / "data") as target,
        single_threaded(),
        connect(address) as cluster,
    ):
        for number in range(rounds):
            for name in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):
                corpus = partial(_corpus, geometry.vocabulary, tokens)
                report = _contend(name, corpus, documents, geometry, target, cluster)
                if report.added != documents:
                    raise Internal(f"{name} stored {report.added} of {documents} documents")
                seconds[name].append(report.seconds)
                progress(f"{name}: {report.seconds:.2f} s, {report.tokens_per_s:,.0f} tokens/s")
        settings = {
            "documents": documents, "tokens": tokens, "rounds": rounds, "layer": _layer(geometry), "quick": quick,
            "geometry": asdict(geometry), "nodes": cluster.nodes, "threads_per_worker": 1,
        }  # fmt: skip
    figures = {
        "ray_speedup_2": ratio(seconds["1 worker"], seconds["2 workers"]),
        "ray_overhead": round(ratio(seconds["1 worker"], seconds["plain"]) - 1, 3),
    }
    rows = [
        row(name, taken, tokens_per_s=round(documents * tokens / sorted(taken)[len(taken) // 2], 1))
        for name, taken in seconds.items()
    ]
    return Result("ingest-ray", figures, rows, settings)


def render(result: Result) -> None:
    """Print the tables."""
    lines = [[one["contender"], one["median_ms"] / 1000, one["tokens_per_s"]] for one in result.rows]
    title = f"{result.settings['documents']} documents of {result.settings['tokens']} tokens into a memory"
    show(title, ["contender", "s", "tokens/s"], lines, result.figures)


def _contend(
    name: str,
    corpus: Callable[[str, int], Iterator[Source]],
    documents: int,
    geometry: Geometry,
    target: str,
    cluster: Cluster,
) -> IngestReport:
    """One turn: the report of what is counted."""
    memory = f"bench-{secrets.token_hex(6)}"
    if name == "plain":
        with ExitStack() as stack:
            parts = _parts(geometry, target, memory, lambda _: None, stack)
            settings = settings_of(parts.encoder)
            ingest(corpus("warming", WARMING), parts.encoder, None, parts.memory, settings=settings)
            return ingest(corpus("counted", documents), parts.encoder, None, parts.memory, settings=settings)
    crew = Crew(int(name[0]), int(name[0]))
    make = partial(IngestWorker, partial(open_parts, geometry, target, memory), Reading())
    with Pool(make, crew, cluster) as pool:
        pool.wait()
        fill(pool, in_batches(corpus("warming", WARMING)), Ledger(Notes()))
        ledger = Ledger(Notes())
        fill(pool, in_batches(corpus("counted", documents)), ledger)
        return ledger.report()


def open_parts(geometry: Geometry, target: str, memory: str, on_block: Callable[[int], None]) -> Parts:
    """What a worker works with until its process ends."""
    return _parts(geometry, target, memory, on_block, ExitStack())


def _parts(geometry: Geometry, target: str, memory: str, on_block: Callable[[int], None], stack: ExitStack) -> Parts:
    base = geometry.build()
    fot = geometry.fot((_layer(geometry),), DType.BF16)
    # No index: a background build would take the processor from what is measured.
    spec = spec_of(base, fot, index=IndexPolicy(factory="none"))
    opened = stack.enter_context(Memory.open(target, memory, spec))
    model = stack.enter_context(FotModel(base, fot, opened))
    return Parts(Encoder(model, on_block=on_block), None, opened)


def _corpus(vocabulary: int, tokens: int, name: str, documents: int) -> Iterator[Source]:
    """Documents of random tokens, the same for every contender."""
    generator = torch.Generator().manual_seed(documents)
    for number in range(documents):
        ids = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
        yield Source(f"{name}-{number}", token_ids=tuple(ids), size=4 * tokens)


def _layer(geometry: Geometry) -> int:
    return min(LAYER, geometry.layers - 1)
