"""Answers with their sources: text as it comes, then which documents and passages it was drawn from.

answer(model, tokenizer, "What is the code?", recall=Recall(top_k=32), on_text=print)

with Answering(model, tokenizer, "What is the code?", recall=Recall(top_k=32)) as pieces:
    for piece in pieces: ...
    pieces.answer.sources.documents
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from memory_service.errors import InvalidArgument
from model_worker.answering.writing import Writer
from model_worker.recall.sources import TELLING, Sources, Telling, listened, sources_of
from model_worker.recall.tally import Tally
from model_worker.settings import Recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model_worker.decoder.model import FotModel

QUESTION = "{question}"  # Where a template takes the question.


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; greedy by default."""

    temperature: float = 0.0  # 0: the most likely token, whatever the rest says.
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens.
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: another text every time.

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise InvalidArgument(
                "sampling needs temperature ≥ 0, top_p in (0, 1], top_k ≥ 0 and repetition_penalty > 0, got "
                f"{self.temperature}, {self.top_p}, {self.top_k} and {self.repetition_penalty}"
            )

    def settings(self) -> dict[str, float | int | bool]:
        """As `generate` takes them."""
        shared: dict[str, float | int | bool] = {"num_beams": 1, "repetition_penalty": self.repetition_penalty}
        if not self.temperature:
            return shared | {"do_sample": False}
        return shared | {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated text and where the attention went while it was written."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    seconds: float
    sources: Sources


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, template: str | None = None) -> list[int]:
    """The token ids of a question in its template; without one in the tokenizer's chat template, if it has any.

    Raises InvalidArgument if the template has no place for the question, or there is nothing to ask.
    """
    if not question.strip():
        raise InvalidArgument("the prompt is empty; there is nothing to answer")
    if template is not None:
        if QUESTION not in template:
            raise InvalidArgument(f"the template needs {QUESTION} where the question goes, got {template!r}")
        return token_ids(tokenizer, template.replace(QUESTION, question))
    return chat_ids(tokenizer, question) if tokenizer.chat_template else token_ids(tokenizer, question)


def chat_ids(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """The token ids of a user's message in the tokenizer's chat template. Raises InvalidArgument if it has none."""
    if not tokenizer.chat_template:
        raise InvalidArgument("this model's tokenizer has no chat template: give the text as the model should see it")
    chat = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # The template writes what begins a text itself.
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text, with what the tokenizer begins texts with."""
    # Long prompts are what memory is for: no warning about the length the model was trained on.
    return list(tokenizer(text, verbose=False)["input_ids"])


def answer(
    model: FotModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int],
    *,
    recall: Recall | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    telling: Telling = TELLING,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Generate from a prompt, text or token ids, and tell the sources; `on_text` gets the text as it comes.

    `recall` is by default the model's. Raises InvalidArgument for an empty prompt, and what the memory raises. The
    sources cost some work of the memory while generating, and a fetch for each passage's text at the end.
    """
    prepared = _Generation(model, tokenizer, prompt, recall, max_new_tokens, sampling, telling)
    return prepared.run(on_text or (lambda _: None), threading.Event())


class Answering:
    """An answer on its way: iterate over the pieces of its text; `close` stops it early.

    Generates in a thread of its own. What goes wrong there is raised to whoever iterates or asks for `answer`.
    """

    def __init__(
        self,
        model: FotModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | Sequence[int],
        *,
        recall: Recall | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        telling: Telling = TELLING,
    ):
        """As `answer`."""
        self._generation = _Generation(model, tokenizer, prompt, recall, max_new_tokens, sampling, telling)
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fot-answering", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; together they are the answer's."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # For whoever iterates again.
        self._raise()

    @property
    def answer(self) -> Answer:
        """The whole answer; waits for it. After `close` it is what there was until then."""
        self._thread.join()
        self._raise()
        if self._answer is None:
            raise RuntimeError("a generation that raised nothing has an answer")
        return self._answer

    def close(self) -> None:
        """Stop after the token under way. Harmless twice."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._answer = self._generation.run(self._pieces.put, self._stop)
        except BaseException as error:
            self._error = error
        finally:
            self._pieces.put(None)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class _Generation:
    """One call of `generate`, prepared and checked."""

    def __init__(
        self,
        model: FotModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | Sequence[int],
        recall: Recall | None,
        max_new_tokens: int,
        sampling: Sampling,
        telling: Telling,
    ):
        if max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens must be ≥ 1, got {max_new_tokens}")
        self.model, self.tokenizer = model, tokenizer
        self.prompt = token_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not self.prompt:
            raise InvalidArgument("the prompt has no tokens; there is nothing to go on from")
        self.max_new_tokens, self.sampling, self.telling = max_new_tokens, sampling, telling
        # The last token of the prompt asks for the first of the answer.
        self.tally = Tally(telling.passage_tokens, first_token=len(self.prompt) - 1)
        self.recall = listened(recall or model.recall, self.tally, sources=telling.documents > 0)

    def run(self, on_text: Callable[[str], None], stop: threading.Event) -> Answer:
        """Generate."""
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        started = time.perf_counter()
        new = self._generate(_Streamer(self.tokenizer, take), stop)
        seconds = time.perf_counter() - started
        sources = sources_of(self.tally, self.model.memory, self.tokenizer, [*self.prompt, *new], self.telling)
        return Answer("".join(pieces), tuple(new), len(self.prompt), seconds, sources)

    def _generate(self, streamer: _Streamer, stop: threading.Event) -> list[int]:
        ids = torch.tensor([self.prompt], device=self.model.device)
        end = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else end
        with torch.random.fork_rng(enabled=self.sampling.seed is not None):
            if self.sampling.seed is not None:
                torch.manual_seed(self.sampling.seed)
            whole = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=pad,
                return_dict_in_generate=False,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
                recall=self.recall,
                **self.sampling.settings(),
            )
        return [int(token) for token in whole[0, len(self.prompt) :]]


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation when asked from elsewhere."""

    def __init__(self, stop: threading.Event):
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stop.is_set(), device=input_ids.device)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Tells the text of the tokens as they come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        self._writer = Writer(tokenizer)
        self._on_text = on_text
        self._prompted = False

    def put(self, value: Tensor) -> None:
        """Take the next token; the first call brings the prompt, which is not told."""
        if self._prompted:
            self._tell(self._writer.add(value.flatten().tolist()))
        self._prompted = True

    def end(self) -> None:
        """Tell what is left."""
        self._tell(self._writer.end())

    def _tell(self, piece: str) -> None:
        if piece:
            self._on_text(piece)
