"""The options that the worker's commands share, and the values they stand for.

Typer reads the annotations; a command passes what it got to the functions below, which raise InvalidArgument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from memory_service import ALL_DOCUMENTS, DType
from memory_service.errors import InvalidArgument
from memory_service.types.conditions import Scalar
from model_worker.settings import LogitScaling, Recall, SelfExtend

TARGET = "grpc://127.0.0.1:7070"  # As the other commands of fot.
NAME = "default"

# --- Which model ----------------------------------------------------------------------------------------------------

Model = Annotated[
    Path,
    typer.Option(
        "--model",
        "-m",
        help="A directory with a Hugging Face checkpoint, or reference, lookup or dictionary: models that come along.",
    ),
]
MemLayers = Annotated[
    str | None,
    typer.Option(
        "--mem-layers", metavar="N[,N…]", help="Layers with a memory; by default the memory's, the checkpoint's, or 2."
    ),
]
Window = Annotated[int | None, typer.Option(min=1, help="Tokens a layer sees locally; by default the checkpoint's.")]
LastContext = Annotated[
    int | None, typer.Option("--last-context", min=1, help="Tokens of a long prompt that stay in the window.")
]
MemDType = Annotated[
    DType | None, typer.Option("--mem-dtype", help="How a new memory stores keys and values; bf16 by default.")
]
ModelDType = Annotated[
    DType | None, typer.Option("--dtype", help="What the model computes in; by default as its weights are stored.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads for the model; by default all cores.")]
Group = Annotated[int | None, typer.Option("--group", min=1, help="Self-Extend: far positions are divided by this.")]
Neighbours = Annotated[
    int | None, typer.Option("--neighbours", min=1, help="Self-Extend: keys nearer than this keep their place.")
]
Scaling = Annotated[LogitScaling, typer.Option("--logit-scaling", help="Self-Extend: sharpen far queries.")]

# --- Which memory ---------------------------------------------------------------------------------------------------

Target = Annotated[
    str,
    typer.Option(
        "--memory",
        "--target",
        "-t",
        envvar="FOT_TARGET",
        help="A directory, grpc://host:port, grpcs://… or unix:/path.",
    ),
]
Name = Annotated[str, typer.Option("--name", "-n", help="The memory's name.")]
TokenFile = Annotated[
    Path | None, typer.Option(envvar="FOT_TOKEN_FILE", help="A file that holds the token; or set FOT_TOKEN.")
]
Ca = Annotated[Path | None, typer.Option(envvar="FOT_CA", help="The authority to trust with grpcs://.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Send the token unencrypted to another machine.")]

# --- What is remembered ---------------------------------------------------------------------------------------------

Documents = Annotated[
    list[str] | None, typer.Option("--document", "-d", help="Only this document; may be given several times.")
]
Where = Annotated[
    str | None, typer.Option(help="Only documents whose metadata match, as in 'lang = python and size < 9000'.")
]
NoDocuments = Annotated[bool, typer.Option("--no-documents", help="Remember the prompt alone, no document.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Keys a query attends to; 0: every key in scope.")]
EngineName = Annotated[str, typer.Option("--engine", help="Who finds the top k: auto, exact or index.")]
LogitGap = Annotated[float | None, typer.Option(help="With --top-k: drop keys this far below the best.")]
Search = Annotated[
    list[str] | None, typer.Option("--search", metavar="NAME=NUMBER", help="Of the index, as in nprobe=32.")
]
MinCoverage = Annotated[
    float, typer.Option(min=0, max=1, help="Fail if less than this share of the scope is searched.")
]
Timeout = Annotated[float | None, typer.Option("--timeout-s", min=0, help="The longest a call to the memory may take.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """Layer numbers from "2" or "2,4"; None stays None."""
    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise InvalidArgument(f"--mem-layers takes layer numbers such as 2 or 2,4, got {text!r}") from None


def sizes_of(text: str, option: str) -> tuple[int, ...]:
    """Numbers of tokens from "262144" or "16K,1M"; K is 1,024 and M is 1,024 of them."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for part in (one.strip().upper().replace("_", "") for one in text.split(",")):
        digits, unit = (part[:-1], units[part[-1]]) if part and part[-1] in units else (part, 1)
        if not digits.isascii() or not digits.isdigit() or not int(digits):
            raise InvalidArgument(f"{option} takes numbers of tokens such as 262144 or 256K, got {text!r}")
        sizes.append(int(digits) * unit)
    return tuple(sizes)


def search_of(pairs: Sequence[str] | None) -> dict[str, float]:
    """What an index is told, from ["nprobe=32", …]."""
    told = {}
    for pair in pairs or ():
        name, equals, number = pair.partition("=")
        try:
            told[name] = float(number)
        except ValueError:
            told[name] = math.nan
        if not (name and equals and math.isfinite(told[name])):
            raise InvalidArgument(f"--search takes name=number such as nprobe=32, got {pair!r}")
    return told


def metadata_of(pairs: Sequence[str] | None) -> dict[str, Scalar]:
    """Metadata from ["lang=python", "year=2020", …]: numbers, true and false are taken for such unless in quotes."""
    told: dict[str, Scalar] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InvalidArgument(f"--metadata takes name=value such as lang=python, got {pair!r}")
        told[name] = _scalar(value)
    return told


def _scalar(word: str) -> Scalar:
    if word in ("true", "false"):
        return word == "true"
    if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'":
        return word[1:-1]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def self_extend_of(
    group: int | None, neighbours: int | None, scaling: LogitScaling = LogitScaling.NONE
) -> SelfExtend | None:
    """Self-Extend, if its two numbers were given."""
    if group is None and neighbours is None:
        return None
    if group is None or neighbours is None:
        raise InvalidArgument("Self-Extend needs both --group and --neighbours")
    return SelfExtend(group, neighbours, scaling)


def recall_of(
    documents: Sequence[str] | None = None,
    where: str | None = None,
    *,
    no_documents: bool = False,
    top_k: int = 0,
    engine: str = "auto",
    logit_gap: float | None = None,
    search: Sequence[str] | None = None,
    min_coverage: float = 1.0,
    timeout_s: float | None = None,
) -> Recall:
    """What a generation remembers and how the memory is asked."""
    if no_documents and (documents or where):
        raise InvalidArgument("--no-documents contradicts --document and --where")
    return Recall(
        documents=() if no_documents else tuple(documents) if documents else ALL_DOCUMENTS,
        where=where,
        top_k=top_k,
        engine=engine,
        logit_gap=logit_gap,
        search=search_of(search),
        min_coverage=min_coverage,
        timeout_s=timeout_s,
    )
