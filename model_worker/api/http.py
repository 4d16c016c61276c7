"""OpenAI's HTTP API: completions and chats, whole or streamed, and models; with our `memory` beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Annotated, cast

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from memory_service.errors import DeadlineExceeded, FotError, InvalidArgument, NotFound
from memory_service.types.callers import Identity, Role
from model_worker.api.answers import Answer
from model_worker.api.gate import Gate
from model_worker.api.keys import Keys, check_role
from model_worker.api.problems import problem_response
from model_worker.api.replies import JsonObject, Reply, memory_of, model_card
from model_worker.api.schemas import Asked, ChatRequest, CompletionRequest
from model_worker.api.streams import EventStream, while_listening
from model_worker.api.traffic import Traffic
from model_worker.api.worker import Question, Worker
from model_worker.serving.requests import Finished, Text

if TYPE_CHECKING:
    from starlette.types import ASGIApp

SILENCE_S = 15.0  # Then a stream says that work goes on.


def http_app(worker: Worker, keys: Keys, traffic: Traffic) -> ASGIApp:
    """The app, behind its gate."""
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="fot", docs_url=None, redoc_url=None)
    routes = _Routes(worker, traffic)
    app.get("/health")(routes.health)
    app.get("/metrics")(routes.metrics)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{name:path}")(routes.model)
    app.post("/v1/completions")(routes.completions)
    app.post("/v1/chat/completions")(routes.chat_completions)
    app.exception_handler(FotError)(_told)
    app.exception_handler(RequestValidationError)(_wrong)
    app.exception_handler(HTTPException)(_unknown)
    app.exception_handler(Exception)(_told)
    return Gate(app, keys, traffic, worker.limits.prompt_bytes)


def _identity(request: Request) -> Identity:
    return cast(Identity, request.state.identity)


Caller = Annotated[Identity, Depends(_identity)]


class _Routes:
    def __init__(self, worker: Worker, traffic: Traffic):
        self._worker = worker
        self._traffic = traffic
        self._created = int(time.time())

    async def health(self) -> Response:
        """Whether it serves; needs no key."""
        draining = self._traffic.draining
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    async def metrics(self, caller: Caller) -> Response:
        """Figures for Prometheus."""
        check_role(caller, Role.READ)
        return PlainTextResponse(self._traffic.page(self._worker.engine.load()), media_type="text/plain; version=0.0.4")

    async def models(self, caller: Caller) -> JsonObject:
        """The one model there is."""
        return {"object": "list", "data": [model_card(self._worker.name, self._created)]}

    async def model(self, name: str, caller: Caller) -> JsonObject:
        """A model by its name."""
        self._worker.check_model(name)
        return model_card(name, self._created)

    async def completions(self, body: CompletionRequest, request: Request, caller: Caller) -> Response:
        """Go on from a text."""
        return await self._answer(body, body.most_tokens, False, request, caller)

    async def chat_completions(self, body: ChatRequest, request: Request, caller: Caller) -> Response:
        """Answer the last message of a chat."""
        return await self._answer(body, body.most_tokens(self._worker.limits.new_tokens), True, request, caller)

    async def _answer(self, body: Asked, most_tokens: int, chat: bool, request: Request, caller: Identity) -> Response:
        check_role(caller, Role.READ)
        body.check()
        self._worker.check_model(body.model)
        until = asyncio.get_running_loop().time() + self._worker.limits.timeout_s
        reply = Reply(self._worker.name, chat, body.tells_usage)

        async def begun() -> tuple[Answer, Text | Finished]:
            answer = await self._worker.answer(caller, await self._question(body, most_tokens))
            try:
                # What goes wrong before the first text still gets a status of its own.
                return answer, await _next(answer, until)
            except BaseException:
                answer.close()
                raise

        answer, first = await while_listening(request.receive, begun())
        if body.stream:
            return EventStream(self._chunks(answer, first, reply, body, until), answer.close)
        with answer:
            whole = await while_listening(request.receive, self._whole(answer, first, reply, body, until))
        return JSONResponse(whole)

    async def _question(self, body: Asked, most_tokens: int) -> Question:
        if isinstance(body, CompletionRequest):
            prompt = body.one_prompt()
            ids = await self._worker.text_prompt(prompt) if isinstance(prompt, str) else prompt
        else:
            assert isinstance(body, ChatRequest)
            ids = await self._worker.chat_prompt([message.turn for message in body.messages])
        look = None if body.memory is None else body.memory.look()
        return Question(ids, most_tokens, body.sampling(), body.stop_texts, look, body.prompt_cache_key or "")

    async def _whole(
        self, answer: Answer, first: Text | Finished, reply: Reply, body: Asked, until: float
    ) -> JsonObject:
        pieces, event = [], first
        while isinstance(event, Text):
            pieces.append(event.text)
            event = await _next(answer, until)
        self._traffic.answered(event)
        return reply.whole("".join(pieces), event, _memory(body, event))

    async def _chunks(
        self, answer: Answer, first: Text | Finished, reply: Reply, body: Asked, until: float
    ) -> AsyncGenerator[JsonObject | None]:
        for chunk in reply.begin():
            yield chunk
        event: Text | Finished | None = first
        while not isinstance(event, Finished):
            yield None if event is None else reply.piece(event.text)
            event = await _next_or_silence(answer, until)
        self._traffic.answered(event)
        for chunk in reply.end(event, _memory(body, event)):
            yield chunk


def _memory(body: Asked, finished: Finished) -> JsonObject | None:
    return None if body.memory is None else memory_of(finished.sources)


async def _next(answer: Answer, until: float) -> Text | Finished:
    try:
        async with asyncio.timeout_at(until):
            return await answer.next()
    except TimeoutError:
        raise DeadlineExceeded("the answer took longer than this worker allows") from None


async def _next_or_silence(answer: Answer, until: float) -> Text | Finished | None:
    try:
        async with asyncio.timeout(SILENCE_S):
            return await _next(answer, until)
    except TimeoutError:
        return None


# --- Errors ---------------------------------------------------------------------------------------------------------


async def _told(request: Request, error: Exception) -> Response:
    return problem_response(error)


async def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = error.errors()[0]
    # ("body", "memory", "top_k") is memory.top_k; a union adds the name of the branch that did not fit.
    field = ".".join(str(part) for part in wrong["loc"][1:])
    told = InvalidArgument(f"{field or 'the request'}: {wrong['msg']}", reason=_reason(wrong["type"]), field=field)
    return problem_response(told)


def _reason(kind: str) -> str:
    return {"extra_forbidden": "UNKNOWN_PARAMETER", "missing": "MISSING_REQUIRED_PARAMETER"}.get(kind, "INVALID_VALUE")


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem_response(NotFound(f"there is no {request.method} {request.url.path}", reason="UNKNOWN_URL"))
    response = problem_response(InvalidArgument(str(error.detail)))
    response.status_code = error.status_code
    return response
