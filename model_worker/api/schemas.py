"""Requests as OpenAI's clients send them, with a `memory` object of ours; these models live at this edge only.

What would change the answer and is not supported is refused by name, unless it has the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from memory_service import ALL_DOCUMENTS
from memory_service.errors import InvalidArgument
from model_worker.answering.answers import Sampling
from model_worker.api.worker import Look
from model_worker.recall.sources import Telling

# Say who asks or how it is billed: harmless whatever they are.
_IGNORED = frozenset(
    {"user", "metadata", "safety_identifier", "service_tier", "parallel_tool_calls", "prompt_cache_retention"}
)
# OpenAI's, not ours: the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}


class Memory(BaseModel):
    """Our extension: what the answer may be drawn from. The reply then tells where attention went."""

    model_config = ConfigDict(strict=True, extra="forbid")

    collection: str
    documents: list[str] | None = None  # Only these; None: all of the collection.
    filter: str | None = None  # As in "lang = python and size < 9000".
    top_k: int = 0  # Tokens a query attends to; 0: all in scope.
    engine: str = "auto"
    search: dict[str, float] = {}
    logit_gap: float | None = None
    min_coverage: float = 1.0
    told_documents: int = 8
    told_passages: int = 3

    def look(self) -> Look:
        """As the worker takes it. Raises InvalidArgument."""
        return Look(
            collection=self.collection,
            documents=ALL_DOCUMENTS if self.documents is None else tuple(self.documents),
            where=self.filter,
            top_k=self.top_k,
            engine=self.engine,
            search=self.search,
            logit_gap=self.logit_gap,
            min_coverage=self.min_coverage,
            telling=Telling(self.told_documents, self.told_passages),
        )


class StreamOptions(BaseModel):
    """What a stream tells beside text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # Pads chunks against onlookers; never done here, and never by default.


class Asked(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: str | None = None  # The conversation: a prompt that goes on from the last text is not read anew.
    memory: Memory | None = None

    def sampling(self) -> Sampling:
        """OpenAI's defaults: temperature 1."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, seed=self.seed)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise InvalidArgument for fields that nobody knows, and for wishes that are not granted."""
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED or (name in _NEUTRAL and (value is None or _is_neutral(name, value))):
                continue
            if name in _NEUTRAL:
                raise InvalidArgument(
                    f"{name!r} is not supported here; leave it out", reason="UNSUPPORTED_PARAMETER", field=name
                )
            raise InvalidArgument(f"Unknown parameter: {name!r}.", reason="UNKNOWN_PARAMETER", field=name)
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("'stream_options' needs 'stream': true", field="stream_options")


def _is_neutral(name: str, value: Any) -> bool:
    # 0 == False, but logprobs 0 asks for those of the answer.
    return any(type(value) in (type(one), float) and value == one for one in _NEUTRAL[name])


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str]

    @property
    def most_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default.

    def one_prompt(self) -> str | tuple[int, ...]:
        """The text or its token ids. Raises InvalidArgument for several prompts."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [one for one in self.prompt if isinstance(one, str)]
        if not texts:
            return tuple(one for one in self.prompt if isinstance(one, int))
        if len(texts) > 1:
            raise InvalidArgument("one prompt a request: send the others beside this one", field="prompt")
        return texts[0]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: str
    content: str | list[TextPart]
    name: str | None = None  # Chat templates have no place for it.
    refusal: None = None  # What comes back in our answers may be sent again as it is.
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def turn(self) -> tuple[str, str]:
        """Role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        # OpenAI's name for the system's words.
        return ("system" if self.role == "developer" else self.role), text


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None

    def most_tokens(self, limit: int) -> int:
        """As many as allowed unless it says so."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return limit if self.max_tokens is None else self.max_tokens
