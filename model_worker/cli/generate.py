"""`fot generate`: go on from a prompt of any length, which goes through memory where it is longer than the window."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated

import typer

from memory_service.errors import InvalidArgument
from model_worker.cli.console import print_json
from model_worker.cli.opening import checkpoint_of, load_model, load_tokenizer
from model_worker.cli.options import (
    NAME,
    Ca,
    Device,
    Documents,
    EngineName,
    Group,
    Insecure,
    Json,
    LastContext,
    LogitGap,
    MemDType,
    MemLayers,
    MinCoverage,
    Model,
    ModelDType,
    Name,
    Neighbours,
    NoDocuments,
    Scaling,
    Search,
    Threads,
    Timeout,
    TokenFile,
    TopK,
    Where,
    Window,
    layers_of,
    recall_of,
    self_extend_of,
)
from model_worker.cli.prompts import (
    MaxNewTokens,
    Passages,
    PassageTokens,
    PromptFile,
    Repetition,
    SampleTopK,
    Seed,
    Shown,
    Temperature,
    TopP,
    open_documents,
    read_prompt,
    sampling_of,
)
from model_worker.cli.sources import show_sources, write_text
from model_worker.recall.passages import PASSAGE_TOKENS
from model_worker.settings import LogitScaling


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from, or - for standard input.")] = None,
    file: PromptFile = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--memory", "--target", "-t", envvar="FOT_TARGET", help="Where documents are; by default there are none."
        ),
    ] = None,
    name: Name = NAME,
    documents: Documents = None,
    where: Where = None,
    no_documents: NoDocuments = False,
    top_k: TopK = 0,
    engine: EngineName = "auto",
    logit_gap: LogitGap = None,
    search: Search = None,
    min_coverage: MinCoverage = 1.0,
    timeout_s: Timeout = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    sample_top_k: SampleTopK = 0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    sources: Annotated[bool, typer.Option("--sources", help="Show afterwards where the attention went.")] = False,
    show_documents: Shown = 8,
    show_passages: Passages = 3,
    passage_tokens: PassageTokens = PASSAGE_TOKENS,
    mem_layers: MemLayers = None,
    mem_dtype: MemDType = None,
    window: Window = None,
    last_context: LastContext = None,
    group: Group = None,
    neighbours: Neighbours = None,
    logit_scaling: Scaling = LogitScaling.NONE,
    dtype: ModelDType = None,
    device: Device = None,
    threads: Threads = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Go on from a prompt of any length; what the window cannot hold is remembered.

    Without --memory the prompt is all there is, in RAM. With it the documents there are remembered too.
    """
    text = read_prompt(prompt, file)
    sampling = sampling_of(temperature, top_p, sample_top_k, repetition_penalty, seed)
    recall = recall_of(
        documents,
        where,
        no_documents=no_documents,
        top_k=top_k,
        engine=engine,
        logit_gap=logit_gap,
        search=search,
        min_coverage=min_coverage,
        timeout_s=timeout_s,
    )
    extend = self_extend_of(group, neighbours, logit_scaling)
    model = checkpoint_of(model)
    with ExitStack() as opened:
        memory = None
        if target is not None:
            # The prompt alone is enough: an empty memory is only wrong if something of it was asked for.
            memory = opened.enter_context(open_documents(target, name, token_file, ca, insecure, recall, needed=False))
        elif documents or where:
            raise InvalidArgument("--document and --where need --memory")

        # Transformers takes seconds to import; what was wrong so far should not.
        from model_worker.answering.answers import answer, chat_ids, token_ids
        from model_worker.recall.sources import Telling

        tokenizer = load_tokenizer(model)
        ids = chat_ids(tokenizer, text) if chat else token_ids(tokenizer, text)
        decoder = load_model(
            model,
            memory,
            mem_layers=layers_of(mem_layers),
            mem_dtype=mem_dtype,
            window=window,
            last_context=last_context,
            dtype=dtype,
            device=device,
            threads=threads,
            self_extend=extend,
        )
        opened.enter_context(decoder)
        answered = answer(
            decoder,
            tokenizer,
            ids,
            recall=recall,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            telling=Telling(show_documents if sources else 0, show_passages, passage_tokens),
            on_text=None if json else write_text,
        )
    if json:
        print_json({"model": str(model), "memory": None if target is None else name, **asdict(answered)})
        return
    sys.stdout.write("\n")
    if sources:
        sys.stdout.write("\n")
        show_sources(answered, top_k)
