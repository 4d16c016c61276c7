"""`fot bench prefill|decode|serving|ingest-ray`: measure a model with a memory, the environment saved beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memory_service.errors import InvalidArgument
from memory_service.types.specs import DType
from model_worker.cli.crew import Address

if TYPE_CHECKING:
    from memory_service.bench.harness import Result

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write all rows and the environment here.")]
Directory = Annotated[
    Path | None, typer.Option(help="Keep what is measured on this disk; by default the temporary one.")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Seconds instead of minutes, to see that it works; the numbers mean nothing.")
]
Tokens = Annotated[str | None, typer.Option(help="Sizes, such as 4096,65536.")]
Layers = Annotated[str | None, typer.Option(help="Sets of memory layers to measure, such as 2/2,4.")]
Dtypes = Annotated[str | None, typer.Option(help="Of the memory: f32, bf16, or both with a comma between.")]
Threads = Annotated[str | None, typer.Option(help="Numbers of threads, such as 1,8.")]
ReferenceTokens = Annotated[int | None, typer.Option(min=0, help="Do not give the reference more than this.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Turns of each contender.")]


def prefill(
    tokens: Tokens = None,
    layers: Layers = None,
    dtypes: Dtypes = None,
    threads: Threads = None,
    reference_tokens: ReferenceTokens = None,
    rounds: Rounds = None,
    directory: Directory = None,
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """Long prompts into memory, against the authors' algorithm, in process and over gRPC; over an hour."""
    from model_worker.bench import prefill as bench

    result = bench.run(
        tokens=_numbers(tokens) or bench.TOKENS,
        layers=_layers(layers) or bench.LAYERS,
        dtypes=_dtypes(dtypes) or bench.DTYPES,
        threads=_numbers(threads) or None,
        reference_tokens=bench.REFERENCE_TOKENS if reference_tokens is None else reference_tokens,
        rounds=rounds or bench.ROUNDS,
        directory=directory,
        quick=quick,
    )
    _finish(result, bench.render, json)


def decode(
    tokens: Tokens = None,
    layers: Layers = None,
    dtypes: Dtypes = None,
    threads: Threads = None,
    reference_tokens: ReferenceTokens = None,
    grpc_tokens: Annotated[int | None, typer.Option(min=0, help="Do not plant more than this in a service.")] = None,
    rounds: Rounds = None,
    directory: Directory = None,
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """Milliseconds a token with up to a million tokens in memory, dense, top-k and indexed; about half an hour."""
    from model_worker.bench import decode as bench

    result = bench.run(
        tokens=_numbers(tokens) or bench.TOKENS,
        layers=_layers(layers) or bench.LAYERS,
        dtypes=_dtypes(dtypes) or bench.DTYPES,
        threads=_numbers(threads) or (1,),
        reference_tokens=bench.REFERENCE_TOKENS if reference_tokens is None else reference_tokens,
        grpc_tokens=bench.GRPC_TOKENS if grpc_tokens is None else grpc_tokens,
        rounds=rounds or bench.ROUNDS,
        directory=directory,
        quick=quick,
    )
    _finish(result, bench.render, json)


def serving(
    streams: Annotated[int | None, typer.Option(min=1, help="Chats at once.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each answer.")] = None,
    model: Annotated[Path | None, typer.Option(help="A checkpoint; by default the reference model.")] = None,
    rounds: Rounds = None,
    directory: Directory = None,
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """Many chats at once, batched against one after another, in process and over gRPC; a few minutes."""
    from model_worker.bench import serving as bench

    result = bench.run(
        streams=streams or bench.STREAMS,
        new_tokens=new_tokens or bench.NEW_TOKENS,
        rounds=rounds or bench.ROUNDS,
        model=model,
        directory=directory,
        quick=quick,
    )
    _finish(result, bench.render, json)


def ingest_ray(
    documents: Annotated[int | None, typer.Option(min=1, help="How many are ingested in a turn.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of each document.")] = None,
    rounds: Rounds = None,
    directory: Directory = None,
    address: Address = None,
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """Ingest by 1 and 2 workers on Ray, against the plain loop, a thread each; some minutes on two free cores."""
    from model_worker.deployment import runtime

    runtime.need_ray()
    from model_worker.deployment import bench

    result = bench.run(
        documents=documents or bench.DOCUMENTS,
        tokens=tokens or bench.TOKENS,
        rounds=rounds or bench.ROUNDS,
        directory=directory,
        address=address,
        quick=quick,
    )
    _finish(result, bench.render, json)


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        found = tuple(int(one) for one in (text or "").split(",") if one)
    except ValueError:
        raise InvalidArgument(f"expected whole numbers with commas between, such as 4096,65536, got {text!r}") from None
    if any(one < 1 for one in found):
        raise InvalidArgument(f"sizes and threads are at least 1, got {text!r}")
    return found


def _layers(text: str | None) -> Sequence[tuple[int, ...]]:
    return [_numbers(one) for one in (text or "").split("/") if one]


def _dtypes(text: str | None) -> Sequence[DType]:
    try:
        return [DType(one) for one in (text or "").split(",") if one]
    except ValueError:
        raise InvalidArgument(f"a memory keeps f32, bf16 or f16, got {text!r}") from None


def _finish(result: Result, render: Callable[[Result], None], file: Path | None) -> None:
    if file is not None:
        file.write_text(result.to_json() + "\n", encoding="utf-8")
    render(result)
