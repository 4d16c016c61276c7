"""`fot ask`: answer a question from the documents of a memory, and show which."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated

import typer

from model_worker.cli.console import print_json
from model_worker.cli.opening import checkpoint_of, load_model, load_tokenizer
from model_worker.cli.options import (
    NAME,
    TARGET,
    Ca,
    Device,
    Documents,
    EngineName,
    Group,
    Insecure,
    Json,
    LastContext,
    LogitGap,
    MemLayers,
    MinCoverage,
    Model,
    ModelDType,
    Name,
    Neighbours,
    Scaling,
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
    self_extend_of,
)
from model_worker.cli.prompts import (
    TOP_K,
    MaxNewTokens,
    Passages,
    PassageTokens,
    Repetition,
    SampleTopK,
    Seed,
    Shown,
    Temperature,
    Template,
    TopP,
    open_documents,
    read_prompt,
    sampling_of,
)
from model_worker.cli.sources import show_sources, write_text
from model_worker.recall.passages import PASSAGE_TOKENS
from model_worker.settings import LogitScaling


def ask(
    question: Annotated[str, typer.Argument(help="The question, or - to read it from standard input.")],
    model: Model,
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
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    sample_top_k: SampleTopK = 0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    show_documents: Shown = 8,
    show_passages: Passages = 3,
    passage_tokens: PassageTokens = PASSAGE_TOKENS,
    mem_layers: MemLayers = None,
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
    """Answer a question from documents in memory, and show which of them the attention went to."""
    question = read_prompt(question)
    sampling = sampling_of(temperature, top_p, sample_top_k, repetition_penalty, seed)
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
    extend = self_extend_of(group, neighbours, logit_scaling)
    model = checkpoint_of(model)
    with ExitStack() as opened:
        memory = opened.enter_context(open_documents(target, name, token_file, ca, insecure, recall))

        # Transformers takes seconds to import; what was wrong so far should not.
        from model_worker.answering.answers import answer, prompt_ids
        from model_worker.recall.sources import Telling

        tokenizer = load_tokenizer(model)
        prompt = prompt_ids(tokenizer, question, template)
        decoder = load_model(
            model,
            memory,
            mem_layers=layers_of(mem_layers),
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
            prompt,
            recall=recall,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            telling=Telling(show_documents, show_passages, passage_tokens),
            on_text=None if json else write_text,
        )
    if json:
        print_json({"question": question, "model": str(model), "memory": name, **asdict(answered)})
        return
    sys.stdout.write("\n\n")
    show_sources(answered, top_k)
