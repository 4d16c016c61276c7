"""`fot memory`: create, list, show and remove memories."""

from __future__ import annotations

from typing import Annotated

import typer

from memory_service.cli.console import (
    TARGET,
    Ca,
    Insecure,
    Json,
    Target,
    TokenFile,
    Yes,
    connect,
    counted,
    print_facts,
    print_json,
    print_table,
    say,
    size,
    sure,
    when,
)
from memory_service.client.arguments import describe
from memory_service.types.memories import MemoryInfo
from memory_service.types.specs import DType, Fingerprint, IndexPolicy, MemorySpec
from memory_service.verbs import CreateMemory, GetMemory

app = typer.Typer(no_args_is_help=True, help="Create, list, show and remove memories.")

Name = Annotated[str, typer.Argument(help="The memory's name.")]


@app.command("create")
def create(
    name: Name,
    model: Annotated[str, typer.Option(help="The model that makes the keys and values.")],
    layers: Annotated[str, typer.Option(help="Its memory layers, as in 6,12,18.")],
    kv_heads: Annotated[int, typer.Option(help="Key/value heads of a layer.")],
    head_dim: Annotated[int, typer.Option(help="Numbers in a key of one head.")],
    dtype: Annotated[DType, typer.Option(help="How keys and values are stored.")] = DType.BF16,
    revision: Annotated[str, typer.Option(help="The model's revision.")] = "",
    weights: Annotated[str, typer.Option(help="Hex digest of the weights that make keys and values.")] = "",
    rope: Annotated[str, typer.Option(help="Canonical JSON of the RoPE parameters.")] = "",
    index: Annotated[str, typer.Option(help="A Faiss index_factory string, auto, or none for exact only.")] = "auto",
    index_after: Annotated[int, typer.Option(help="Unindexed tokens that start a build.")] = IndexPolicy().min_tokens,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Create a memory; what it keeps cannot be changed later. A directory that is not there is made."""
    spec = MemorySpec(
        fingerprint=Fingerprint(model, revision, weights, rope),
        layers=_numbers(layers),
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        index=IndexPolicy(index, index_after),
    )
    spec.check()
    with connect(target, token_file, ca, insecure, create=True) as client:
        info = client.run(CreateMemory(name, spec))
    if json:
        print_json(info)
    else:
        say(f"Created memory {info.name}: {describe(info.spec)}; {size(spec.bytes_per_token)} a token.")


@app.command("ls")
def list_(
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """List the memories."""
    with connect(target, token_file, ca, insecure) as client:
        memories = list(client.memories())
    if json:
        print_json(memories)
        return
    rows = [(m.name, describe(m.spec), f"{m.documents:,}", f"{m.tokens:,}", size(m.bytes)) for m in memories]
    print_table("", ("memory", "keeps", "documents ", "tokens ", "size "), rows, "No memories yet: fot memory create.")


@app.command("show")
def show(
    name: Name,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Show one memory: what it keeps and how much."""
    with connect(target, token_file, ca, insecure) as client:
        info = client.run(GetMemory(name))
    if json:
        print_json(info)
    else:
        print_facts(f"Memory {info.name}", _facts(info))


@app.command("rm")
def remove(
    name: Name,
    target: Target = TARGET,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    yes: Yes = False,
) -> None:
    """Remove a memory with all its documents and sessions."""
    with connect(target, token_file, ca, insecure) as client:
        info = client.run(GetMemory(name))
        sure(f"Remove memory {name} with {counted(info.documents, 'document')} ({size(info.bytes)})?", yes)
        client.delete(name)
    say(f"Removed memory {name}.")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"layers are numbers with commas, as in 6,12,18; got {text!r}") from None


def _facts(info: MemoryInfo) -> list[tuple[str, object]]:
    spec, made = info.spec, info.spec.fingerprint
    index = "none: always exact" if spec.index.factory == "none" else spec.index.factory
    return [
        ("model", " ".join(filter(None, (made.model, made.revision)))),
        *([("weights", made.weights)] if made.weights else []),
        *([("rope", made.rope)] if made.rope else []),
        ("layers", ", ".join(map(str, spec.layers))),
        ("heads", f"{spec.kv_heads} × {spec.head_dim}, {spec.dtype}, {size(spec.bytes_per_token)} a token"),
        ("index", f"{index}, from {spec.index.min_tokens:,} tokens"),
        ("documents", f"{info.documents:,}"),
        ("tokens", f"{info.tokens:,}"),
        ("size", size(info.bytes)),
        ("created", when(info.created_at)),
    ]
