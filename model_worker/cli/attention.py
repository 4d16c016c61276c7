"""`fot attention`: draw, for a prompt, how much attention each document and passage in memory gets."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from memory_service.errors import InvalidArgument
from model_worker.cli.console import say
from model_worker.cli.opening import checkpoint_of, load_model, load_tokenizer
from model_worker.cli.options import (
    NAME,
    TARGET,
    Ca,
    Device,
    Documents,
    EngineName,
    Insecure,
    LastContext,
    LogitGap,
    MemLayers,
    MinCoverage,
    Model,
    ModelDType,
    Name,
    Search,
    Target,
    Threads,
    Timeout,
    TokenFile,
    TopK,
    Where,
    Window,
    layers_of,
    recall_of,
)
from model_worker.cli.prompts import TOP_K, Passages, PassageTokens, PromptFile, Template, open_documents, read_prompt
from model_worker.cli.sources import percent
from model_worker.recall.passages import PASSAGE_TOKENS

_KINDS = (".png", ".html")


def attention(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: a .png or an .html.")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt, or - for standard input.")] = None,
    file: PromptFile = None,
    new_tokens: Annotated[int, typer.Option(min=0, help="Also let the model go on for so many tokens.")] = 0,
    target: Target = TARGET,
    name: Name = NAME,
    documents: Documents = None,
    where: Where = None,
    top_k: TopK = TOP_K,
    engine: EngineName = "auto",
    logit_gap: LogitGap = None,
    search: Search = None,
    min_coverage: MinCoverage = 1.0,
    timeout_s: Timeout = None,
    template: Template = None,
    show_documents: Annotated[int, typer.Option(min=1, help="Rows; the documents beyond are drawn as one.")] = 12,
    show_passages: Passages = 3,
    passage_tokens: PassageTokens = PASSAGE_TOKENS,
    mem_layers: MemLayers = None,
    window: Window = None,
    last_context: LastContext = None,
    dtype: ModelDType = None,
    device: Device = None,
    threads: Threads = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
) -> None:
    """Draw a heat map of the attention a prompt pays to documents, their passages, by layer and by token.

    An .html also holds the words of the best passages.
    """
    if out.suffix.lower() not in _KINDS:
        raise InvalidArgument(f"--out takes a file that ends in {' or '.join(_KINDS)}, got {out}")
    if not out.parent.is_dir():
        raise InvalidArgument(f"--out: there is no directory {out.parent}")
    text = read_prompt(prompt, file)
    recall = recall_of(
        documents,
        where,
        top_k=top_k,
        engine=engine,
        logit_gap=logit_gap,
        search=search,
        min_coverage=min_coverage,
        timeout_s=timeout_s,
    )
    model = checkpoint_of(model)
    with ExitStack() as opened:
        memory = opened.enter_context(open_documents(target, name, token_file, ca, insecure, recall))

        # Transformers and matplotlib take seconds to import; what was wrong so far should not.
        from model_worker.answering.answers import prompt_ids
        from model_worker.heatmap.grid import heat_map, observe

        tokenizer = load_tokenizer(model)
        ids = prompt_ids(tokenizer, text, template)
        decoder = load_model(
            model,
            memory,
            mem_layers=layers_of(mem_layers),
            window=window,
            last_context=last_context,
            dtype=dtype,
            device=device,
            threads=threads,
        )
        opened.enter_context(decoder)
        tally, whole = observe(decoder, ids, recall, new_tokens, passage_tokens)
        heat = heat_map(
            tally,
            memory,
            tokenizer,
            whole,
            model=model.resolve().name,
            prompt=text,
            prompt_tokens=len(ids),
            top_k=top_k,
            rows=show_documents,
            passages=show_passages,
        )
    if out.suffix.lower() == ".png":
        from model_worker.heatmap.picture import save_picture

        save_picture(heat, out)
    else:
        from model_worker.heatmap.page import save_page

        save_page(heat, out)
    best = heat.sources.documents[0] if heat.sources.documents else None
    told = f"; most went to {best.document}, {percent(best.mass)}" if best else "; no document got any attention"
    say(f"Wrote {out}{told}.")
