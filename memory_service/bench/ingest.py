"""`fot bench ingest`: how fast bytes become durable, against a plain sequential write and fsync on the same disk.

Contenders, taken in turns, each with the same payload of keys, values and token ids:

    disk        1 MiB writes into a fresh file, then fsync
    inprocess   Memory.put into a directory: returns when payload and catalogue are fsynced
    grpc        Memory.put to a service in another process, whose directory is on the same disk

and then documents of 512 tokens, stored by 16 writers at once: commits a second, in process and over gRPC.
Every contender starts after a `sync`, so that nobody pays for the bytes of the one before.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory_service.bench.harness import (
    Progress,
    Result,
    file_system,
    interleave,
    ratio,
    row,
    say,
    scratch,
    served,
    show,
    single_threaded,
)
from memory_service.client import Client
from memory_service.types.specs import Fingerprint, IndexPolicy, MemorySpec

HEADS, DIM = 4, 64
MIB = 1 << 20
SMALL_TOKENS = 512
WRITERS = 16
# No index: the benchmark is about durability, and a background build would take the processor from it.
SPEC = MemorySpec(Fingerprint("bench"), (0,), HEADS, DIM, index=IndexPolicy(factory="none"))


def run(
    *,
    size_mib: int = 256,
    rounds: int = 5,
    documents: int = 640,
    writers: int = WRITERS,
    directory: Path | None = None,
    quick: bool = False,
    progress: Progress = say,
) -> Result:
    """Measure both; two minutes, or seconds with `quick`. `directory` must be on the disk that is meant."""
    if quick:
        size_mib, rounds, documents = 8, 2, 2 * writers
    tokens = size_mib * MIB // SPEC.bytes_per_token
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, HEADS, tokens, DIM, generator=generator).bfloat16()
    ids = torch.randint(0, 50_000, (tokens,), generator=generator)
    payload = keys.nbytes + values.nbytes + 4 * tokens
    with single_threaded(), scratch(directory, "fot-bench-ingest-") as place, _places(place) as places:
        plain = place / "plain"

        def tidy() -> None:
            plain.unlink(missing_ok=True)
            for one in places.values():
                one.renew()
            os.sync()

        progress(f"{payload / MIB:,.0f} MiB to durable, {rounds} rounds")
        put = {name: partial(one.put, keys, values, ids) for name, one in places.items()}
        seconds = interleave({"disk": partial(_write, plain, keys, values, ids)} | put, rounds, before=tidy)
        rows = [
            row(name, taken, bytes=payload, mb_per_s=round(payload / statistics.median(taken) / 1e6, 1))
            for name, taken in seconds.items()
        ]
        small_keys, small_values = keys[:, :, :SMALL_TOKENS], values[:, :, :SMALL_TOKENS]
        progress(f"{documents} documents of {SMALL_TOKENS} tokens, {writers} writers, {rounds} rounds")
        store = {
            name: partial(one.put_many, documents, writers, small_keys, small_values) for name, one in places.items()
        }
        many = interleave(store, rounds, before=tidy)
        rows += [
            row(f"{name}, small", taken, documents=documents, commits_per_s=_per_second(documents, taken))
            for name, taken in many.items()
        ]
        figures = {
            "grpc_vs_disk": ratio(seconds["disk"], seconds["grpc"]),
            "inprocess_vs_disk": ratio(seconds["disk"], seconds["inprocess"]),
            "commits_per_s": _per_second(documents, many["grpc"]),
            "inprocess_commits_per_s": _per_second(documents, many["inprocess"]),
        }
        settings = {"size_mib": size_mib, "rounds": rounds, "documents": documents, "writers": writers, "quick": quick}
        where = {"small_tokens": SMALL_TOKENS, "file_system": file_system(place)}
        return Result("ingest", figures, rows, settings | where)


def render(result: Result) -> None:
    """Print the medians and the figures."""
    lines = [
        (r["contender"], r["median_ms"], r["p25_ms"], r["p75_ms"], r.get("mb_per_s", ""), r.get("commits_per_s", ""))
        for r in result.rows
    ]
    columns = ("contender", "median ms", "p25", "p75", "MB/s", "commits/s")
    show(f"ingest to durable, on {result.settings['file_system']}", columns, lines, result.figures)


# --- Contenders -----------------------------------------------------------------------------------------------------


def _write(path: Path, keys: Tensor, values: Tensor, ids: Tensor) -> None:
    """The baseline: the same bytes, sequentially, then fsync."""
    with path.open("wb", buffering=0) as file:
        for tensor in (keys.view(torch.int16), values.view(torch.int16), ids.int()):
            content = tensor.numpy().reshape(-1).view(np.uint8).data
            for start in range(0, len(content), MIB):
                file.write(content[start : start + MIB])
        os.fsync(file.fileno())


class _Place:
    """A client with one memory to write to, emptied between rounds."""

    def __init__(self, client: Client):
        self._client = client
        self._memory = client.memory("bench", SPEC)

    def renew(self) -> None:
        """Delete what was stored and start with an empty memory."""
        self._client.delete("bench")
        self._memory = self._client.memory("bench", SPEC)

    def put(self, keys: Tensor, values: Tensor, ids: Tensor) -> None:
        self._memory.put("doc", keys, values, token_ids=ids)

    def put_many(self, documents: int, writers: int, keys: Tensor, values: Tensor) -> None:
        """Store small documents by several writers at once, each waiting for its own commit before the next."""
        memory = self._memory

        def write(writer: int) -> None:
            for number in range(writer, documents, writers):
                memory.put(f"doc-{number}", keys, values)

        with ThreadPoolExecutor(writers) as pool:
            for done in [pool.submit(write, writer) for writer in range(writers)]:
                done.result()


def _per_second(documents: int, seconds: Sequence[float]) -> float:
    return round(documents / statistics.median(seconds), 1)


@contextmanager
def _places(place: Path) -> Iterator[dict[str, _Place]]:
    with ExitStack() as stack:
        local = stack.enter_context(Client.open(str(place / "here")))
        remote = stack.enter_context(Client.open(stack.enter_context(served(place / "there"))))
        yield {"inprocess": _Place(local), "grpc": _Place(remote)}
