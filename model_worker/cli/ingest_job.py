"""What `fot ingest` does, in this process or by workers on a Ray cluster."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from model_worker.cli.crew import address_of, crew_of, device_of, model_of, token_of
from model_worker.cli.opening import find_memory, load_model, load_tokenizer, open_memory
from model_worker.cli.progress import Progress
from model_worker.corpus import Choice, Notes, Reading, places, read

if TYPE_CHECKING:
    from memory_service import DocumentInfo, DType, Memory
    from memory_service.types.conditions import Scalar
    from memory_service.types.memories import MemoryInfo
    from model_worker.ingestion.ingest import Parts
    from model_worker.ingestion.intake import IngestReport


@dataclass(frozen=True, slots=True)
class Opening:
    """How the model and the memory are opened, by whoever encodes."""

    model: str | Path
    target: str
    name: str
    mem_layers: tuple[int, ...] | None
    window: int | None
    overlap: int | None
    mem_dtype: DType | None
    dtype: DType | None
    device: str | None
    threads: int | None
    token: str | Path | None  # Itself, or its file.
    ca: Path | None
    insecure: bool

    def memory(self) -> Memory:
        """The memory, which is there."""
        return open_memory(self.target, self.name, self.token, self.ca, self.insecure)

    def parts(self, stack: ExitStack, on_block: Callable[[int], None]) -> Parts:
        """Everything, closed with the stack; the memory is made if there is none."""
        # Transformers takes seconds to import; a wrong path should not.
        from model_worker.ingestion.encoding import Encoder
        from model_worker.ingestion.ingest import Parts

        tokenizer = load_tokenizer(Path(self.model))
        memory = find_memory(self.target, self.name, self.token, self.ca, self.insecure)
        if memory is not None:
            stack.enter_context(memory)
        decoder = load_model(
            Path(self.model),
            memory,
            mem_layers=self.mem_layers,
            window=self.window,
            mem_dtype=self.mem_dtype,
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
        )
        stack.enter_context(decoder)
        encoder = Encoder(decoder, self.overlap, on_block=on_block)
        if memory is None:
            spec = encoder.spec
            memory = stack.enter_context(open_memory(self.target, self.name, self.token, self.ca, self.insecure, spec))
        return Parts(encoder, tokenizer, memory)


@dataclass(frozen=True, slots=True)
class Job:
    """An ingest as the command line tells it."""

    paths: Sequence[Path]
    opening: Opening
    choice: Choice
    reading: Reading
    limit: int | None
    special_tokens: bool
    replace: bool
    prune: bool

    @property
    def belongs(self) -> Callable[[DocumentInfo], bool] | None:
        """What may be pruned."""
        return _belongs(self.paths, self.reading.prefix, self.reading.metadata) if self.prune else None

    def run_here(self, progress: Progress) -> tuple[IngestReport, MemoryInfo]:
        """In this process: what was done, and the memory after it."""
        from model_worker.ingestion.ingest import ingest
        from model_worker.ingestion.intake import settings_of

        notes, reading = Notes(), self.reading
        with ExitStack() as opened:
            parts = self.opening.parts(opened, progress.encoded)
            sources = read(
                self.paths, choice=self.choice, columns=reading.columns, bad_bytes=reading.bad_bytes,
                prefix=reading.prefix, metadata=reading.metadata, note=notes,
            )  # fmt: skip
            report = ingest(
                islice(sources, self.limit),
                parts.encoder,
                parts.tokenizer,
                parts.memory,
                settings=settings_of(parts.encoder),
                special_tokens=self.special_tokens,
                replace=self.replace,
                belongs=self.belongs,
                notes=notes,
                on_progress=progress.reached,
            )
            return report, parts.memory.info()

    def run_on_ray(self, crew: OnCluster, progress: Progress) -> tuple[IngestReport, MemoryInfo]:
        """By workers on a cluster: what was done, and the memory after it."""
        from model_worker.deployment.runtime import connect, need_ray

        need_ray()
        from model_worker.deployment.ingest import Corpus, IngestWorker, batches_of, ingest

        given = self.opening
        opening = replace(
            given, model=model_of(given.model), token=token_of(given.token), device=device_of(given.device, crew.gpus)
        )
        corpus = Corpus(tuple(self.paths), self.choice, self.reading, self.limit, crew.workers_read)
        notes = Notes()
        make = partial(
            IngestWorker,
            partial(open_parts, opening),
            self.reading,
            special_tokens=self.special_tokens,
            replace=self.replace,
            request=secrets.token_hex(8),
        )
        with connect(address_of(crew.address, given.target)) as cluster:
            report = ingest(
                batches_of(corpus, notes),
                make,
                crew_of(crew.workers, crew.cpus, crew.gpus, cluster),
                cluster,
                memory=given.memory,
                belongs=self.belongs,
                notes=notes,
                on_progress=progress.reached,
                on_tokens=progress.encoded,
            )
            with given.memory() as memory:
                return report, memory.info()


@dataclass(frozen=True, slots=True)
class OnCluster:
    """Where workers run, how many, and what each takes."""

    address: str | None
    workers: str | None
    cpus: float | None
    gpus: float | None
    workers_read: bool


def open_parts(opening: Opening, on_block: Callable[[int], None]) -> Parts:
    """What a worker works with until its process ends."""
    return opening.parts(ExitStack(), on_block)


def _belongs(paths: Sequence[Path], prefix: str, extra: Mapping[str, Scalar]) -> Callable[[DocumentInfo], bool]:
    """Whether a stored document came from these paths, under the same prefix and with the same metadata."""
    root, named = places(paths)
    wanted = {"root": root, **extra}

    def belongs(document: DocumentInfo) -> bool:
        told = document.metadata
        return (
            document.id.startswith(prefix)
            and all(told.get(key) == value for key, value in wanted.items())
            and any(place.holds(str(told.get("path"))) for place in named)
        )

    return belongs
