"""What the asking commands share: where a prompt comes from, how tokens are chosen, what there is to remember."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memory_service import FailedPrecondition, NotFound
from memory_service.errors import InvalidArgument
from model_worker.cli.opening import open_memory
from model_worker.settings import Recall

if TYPE_CHECKING:
    from memory_service import Memory, Scope
    from model_worker.answering.answers import Sampling

TOP_K = 32

PromptFile = Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from this file.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Template = Annotated[
    str | None,
    typer.Option(help="As in 'Q: {question} A:'; by default the model's chat template, if it has one."),
]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens that together reach this.")]
SampleTopK = Annotated[int, typer.Option("--sample-top-k", min=0, help="Sample from so many tokens; 0: from all.")]
Repetition = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: repeat less.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Sample the same text again.")]
Shown = Annotated[int, typer.Option("--show-documents", min=1, help="Documents in the table.")]
Passages = Annotated[int, typer.Option("--show-passages", min=0, help="Passages of each in the table.")]
PassageTokens = Annotated[int, typer.Option(min=1, help="The length of a passage.")]


def read_prompt(prompt: str | None, file: Path | None = None) -> str:
    """The prompt: as given, from a file, or "-" for standard input. Raises InvalidArgument unless there is just one."""
    if (prompt is None) == (file is None):
        raise InvalidArgument("give the prompt as an argument, as - for standard input, or with --file")
    try:
        text = file.read_text(encoding="utf-8") if file is not None else sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError:
        raise InvalidArgument(f"{file or 'standard input'} is not UTF-8 text") from None
    if not text or not text.strip():
        raise InvalidArgument("the prompt is empty")
    return text


def sampling_of(temperature: float, top_p: float, top_k: int, repetition_penalty: float, seed: int | None) -> Sampling:
    """How the next token is chosen. Raises InvalidArgument for options that would change nothing."""
    from model_worker.answering.answers import Sampling

    if not temperature and (top_p != 1 or top_k or seed is not None):
        raise InvalidArgument("--top-p, --sample-top-k and --seed are for sampling: give a --temperature above 0")
    return Sampling(temperature, top_p, top_k, repetition_penalty, seed)


def open_documents(
    target: str,
    name: str,
    token_file: Path | None,
    ca: Path | None,
    insecure: bool,
    recall: Recall,
    needed: bool = True,
) -> Memory:
    """The memory that is asked. Raises NotFound, and with `needed` FailedPrecondition if nothing is in scope there.

    An answer from nothing would look like one from the memory.
    """
    try:
        memory = open_memory(target, name, token_file, ca, insecure)
    except NotFound as error:
        raise NotFound(f"{error.message.partition(';')[0]}; `fot ingest` makes a memory", reason=error.code) from None
    try:
        _check_scope(memory, recall.scope(), needed)
    except BaseException:
        memory.close()
        raise
    return memory


def _check_scope(memory: Memory, scope: Scope, needed: bool) -> None:
    if scope.documents:
        found = [memory.get(document) for document in scope.documents]
        if scope.where is None or any(scope.where.matches(document.metadata) for document in found):
            return
    elif next(iter(memory.documents(scope.where)), None) is not None or not (needed or scope.where):
        return
    if scope.where is not None:
        raise FailedPrecondition(f"no document of memory {memory.name!r} matches --where; `fot docs ls` shows them")
    raise FailedPrecondition(f"memory {memory.name!r} has no documents yet; `fot ingest` stores some")
