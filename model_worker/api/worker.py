"""What a caller may ask of a model: questions, chats, documents. The rules of both transports, and neither of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from memory_service import ALL_DOCUMENTS, Memory, ScopeLike
from memory_service.errors import InvalidArgument, NotFound
from memory_service.types.callers import Identity
from model_worker.answering.answers import GREEDY, Sampling
from model_worker.api.answers import Answer
from model_worker.api.intake import Intake
from model_worker.api.limits import Limits
from model_worker.api.tenants import Tenants
from model_worker.decoder.model import FotModel
from model_worker.recall.sources import TELLING, Telling
from model_worker.serving.requests import Generates, Request
from model_worker.settings import Recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model_worker.serving.load import Load

ROLES = ("system", "user", "assistant")
_NOTHING = Recall(documents=())


@dataclass(frozen=True, slots=True)
class Look:
    """What of the caller's memory an answer may be drawn from, and how it is searched."""

    collection: str
    documents: ScopeLike = ALL_DOCUMENTS
    where: str | None = None
    top_k: int = 0
    engine: str = "auto"
    search: Mapping[str, float] = field(default_factory=dict)
    logit_gap: float | None = None
    min_coverage: float = 1.0
    telling: Telling = TELLING

    def recall(self) -> Recall:
        """As the model takes it. Raises InvalidArgument."""
        return Recall(
            documents=self.documents,
            where=self.where,
            top_k=self.top_k,
            engine=self.engine,
            search=self.search,
            logit_gap=self.logit_gap,
            min_coverage=self.min_coverage,
        )


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and how it is to be answered."""

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    look: Look | None = None  # None: no documents.
    conversation: str = ""  # Of this tenant and collection; "" keeps nothing.


class Engine(Generates, Protocol):
    """Whoever generates, and says how busy it is."""

    def load(self) -> Load: ...


class Worker:
    """A model under a name, its tenants' memories, and whoever generates."""

    def __init__(
        self,
        name: str,
        model: FotModel,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        tenants: Tenants,
        limits: Limits | None = None,
    ):
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.tenants = tenants
        self.limits = limits or Limits()
        self.intake = Intake(model, tokenizer, self.limits.waiting_bytes)
        self.engine = engine

    @property
    def can_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def check_model(self, name: str) -> None:
        """Raise NotFound unless this is the model that is asked for."""
        if name != self.name:
            raise NotFound(
                f"the model {name!r} does not exist; here is {self.name!r}", reason="MODEL_NOT_FOUND", field="model"
            )

    async def answer(self, identity: Identity, question: Question) -> Answer:
        """Begin to answer; close what comes back. Raises NotFound for a collection, InvalidArgument, and so on."""
        self._check(question)
        look = question.look
        recall = _NOTHING if look is None else look.recall()
        memory = None if look is None else await self.memory(identity, look.collection)
        # A conversation belongs to who began it, and to what it was drawn from.
        place = f"{identity.tenant}/{'' if look is None else look.collection}/{question.conversation}"
        request = Request(
            question.ids,
            question.max_new_tokens,
            question.sampling,
            question.stop,
            recall,
            Telling(0) if look is None else look.telling,
            memory,
            place if question.conversation else None,
        )
        return Answer(self.engine, request)

    async def memory(self, identity: Identity, collection: str, *, create: bool = False) -> Memory:
        """A collection of the caller, made for this model with `create`. Raises NotFound."""
        spec = self.model.spec if create else None
        return await asyncio.to_thread(self.tenants.memory, identity, collection, spec)

    async def text_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a text to go on from. Raises InvalidArgument if it is empty or too long."""
        self._check_length(text)
        return await asyncio.to_thread(self._ids, text, True)

    async def chat_prompt(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Token ids of a chat, (role, content), in the model's template. Raises InvalidArgument."""
        if not self.can_chat:
            raise InvalidArgument(
                "this model has no chat template: ask for a completion, with the text as the model should see it",
                reason="NO_CHAT_TEMPLATE",
            )
        if not messages:
            raise InvalidArgument("a chat needs at least one message", field="messages")
        for number, (role, _) in enumerate(messages):
            if role not in ROLES:
                wanted = ", ".join(ROLES)
                raise InvalidArgument(f"message {number} has the role {role!r}; roles are {wanted}", field="messages")
        self._check_length("".join(content for _, content in messages))
        return await asyncio.to_thread(self._chat_ids, messages)

    def close(self) -> None:
        """Finish what is being stored."""
        self.intake.close()

    def _chat_ids(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        from jinja2 import TemplateError

        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            text = str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:  # Templates refuse chats they were not made for, such as two users in a row.
            raise InvalidArgument(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from None
        # The template writes what begins a text itself.
        return self._ids(text, False)

    def _ids(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])

    def _check_length(self, text: str) -> None:
        if not text:
            raise InvalidArgument("the prompt is empty; there is nothing to answer", field="prompt")
        if len(text) > self.limits.prompt_bytes:
            raise InvalidArgument(f"the prompt is longer than {self.limits.prompt_bytes} bytes", field="prompt")

    def _check(self, question: Question) -> None:
        limits, look = self.limits, question.look
        vocabulary = len(self.tokenizer)
        if not question.ids or not 0 <= min(question.ids) <= max(question.ids) < vocabulary:
            raise InvalidArgument(f"a prompt is at least one token id of 0 to {vocabulary - 1}", field="prompt")
        if not 1 <= question.max_new_tokens <= limits.new_tokens:
            raise InvalidArgument(f"an answer has 1 to {limits.new_tokens} tokens here", field="max_tokens")
        if len(question.stop) > limits.stop_texts or not all(question.stop):
            raise InvalidArgument(f"stop is at most {limits.stop_texts} texts, none of them empty", field="stop")
        if look is not None and max(look.telling.documents, look.telling.passages) > limits.told:
            raise InvalidArgument(f"at most {limits.told} documents and passages are told", field="memory")
