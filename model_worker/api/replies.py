"""Answers as OpenAI's clients read them, whole or in chunks; `memory` says where attention went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from model_worker.recall.sources import Sources
from model_worker.serving.requests import Finished

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one request, in one piece or in chunks that share an id."""

    model: str
    chat: bool  # Of a chat, or of a plain completion.
    tells_usage: bool = False  # In a stream.
    key: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))  # Seconds since the epoch.

    def whole(self, text: str, finished: Finished, memory: JsonObject | None) -> JsonObject:
        """The answer in one piece."""
        words = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        body = self._body("chat.completion" if self.chat else "text_completion", [_choice(words, finished.reason)])
        body["usage"] = usage_of(finished)
        return body if memory is None else body | {"memory": memory}

    def begin(self) -> list[JsonObject]:
        """Chunks before the first text: in a chat, who speaks."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def piece(self, text: str) -> JsonObject:
        """A chunk of text."""
        return self._chunk({"delta": {"content": text}} if self.chat else {"text": text})

    def end(self, finished: Finished, memory: JsonObject | None) -> list[JsonObject]:
        """Chunks after the last text: why it ended, and the usage if that was asked for; the last has `memory`."""
        chunks = [self._chunk({"delta": {}} if self.chat else {"text": ""}, finished.reason)]
        if self.tells_usage:
            chunks.append(self._body(self._kind, []) | {"usage": usage_of(finished)})
        if memory is not None:
            chunks[-1]["memory"] = memory
        return chunks

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, words: JsonObject, reason: str | None = None) -> JsonObject:
        body = self._body(self._kind, [_choice(words, reason)])
        return body | {"usage": None} if self.tells_usage else body

    def _body(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.key}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage_of(finished: Finished) -> JsonObject:
    """Tokens in and out."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


def memory_of(sources: Sources) -> JsonObject:
    """Where attention went: the shares of documents, window, session and others sum to 1."""
    passages = [
        {
            "document": one.document,
            "first_token": passage.first_token,
            "tokens": passage.tokens,
            "share": passage.mass,
            "text": passage.text,
        }
        for one in sources.documents
        for passage in one.passages
    ]
    return {
        "documents": [{"id": one.document, "share": one.mass, "tokens": one.tokens} for one in sources.documents],
        "passages": sorted(passages, key=lambda passage: -passage["share"]),
        "window_share": sources.window_mass,
        "session_share": sources.session_mass,
        "other_share": sources.other_mass,
        "coverage": sources.coverage,
        "searched_tokens": sources.searched_tokens,
        "engine": sources.engine,
    }


def model_card(name: str, created: int) -> JsonObject:
    """A model as /v1/models lists it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "fot"}


def _choice(words: JsonObject, reason: str | None) -> JsonObject:
    return {"index": 0, **words, "logprobs": None, "finish_reason": reason}
