"""The rpcs of model_worker.v1: decode, ask the worker, encode. Who calls, errors and deadlines are the guard's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from memory_service.errors import InvalidArgument, NotFound
from memory_service.filters import filter_of
from memory_service.types.callers import Identity
from memory_service.verbs import ListDocuments
from model_worker.api.answers import Answer
from model_worker.api.messages import (
    NEW_TOKENS,
    read_look,
    read_sampling,
    write_collection,
    write_document,
    write_finished,
)
from model_worker.api.parcels import Parcels
from model_worker.api.traffic import Traffic
from model_worker.api.worker import Question, Worker
from model_worker.serving.requests import Finished
from model_worker.v1 import model_worker_pb2 as pb

Response = TypeVar("Response", pb.GenerateResponse, pb.ChatResponse)
_PAGE = 100
_MOST_IDS = 1000


class Rpcs:
    """Every rpc takes a message and who calls; gRPC's server and Ray Serve's both bring them here."""

    def __init__(self, worker: Worker, traffic: Traffic):
        self._worker = worker
        self._traffic = traffic

    async def GetModel(self, request: pb.GetModelRequest, caller: Identity) -> pb.GetModelResponse:
        """What answers here."""
        fot = self._worker.model.fot
        return pb.GetModelResponse(
            id=self._worker.name,
            memory_layers=fot.mem_layers,
            window=fot.window,
            chat=self._worker.can_chat,
            most_new_tokens=self._worker.limits.new_tokens,
        )

    async def CreateCollection(
        self, request: pb.CreateCollectionRequest, caller: Identity
    ) -> pb.CreateCollectionResponse:
        """A collection for this model."""
        memory = await self._worker.memory(caller, request.name, create=True)
        return pb.CreateCollectionResponse(collection=write_collection(await asyncio.to_thread(memory.info)))

    async def PutDocuments(
        self, requests: AsyncIterator[pb.PutDocumentsRequest], caller: Identity
    ) -> pb.PutDocumentsResponse:
        """Documents, stored a batch at a time while more come."""
        parcels = Parcels(self._worker, caller)
        async for request in requests:
            await parcels.take(request)
        return await parcels.end()

    async def GetDocument(self, request: pb.GetDocumentRequest, caller: Identity) -> pb.GetDocumentResponse:
        """One document."""
        memory = await self._worker.memory(caller, request.collection)
        return pb.GetDocumentResponse(document=write_document(await asyncio.to_thread(memory.get, request.id)))

    async def ListDocuments(self, request: pb.ListDocumentsRequest, caller: Identity) -> pb.ListDocumentsResponse:
        """A page of documents."""
        memory = await self._worker.memory(caller, request.collection)
        verb = ListDocuments(
            memory.name, filter_of(request.filter or None), request.page_size or _PAGE, request.page_token
        )
        page = await asyncio.to_thread(memory.connection.run, verb)
        return pb.ListDocumentsResponse(documents=map(write_document, page.items), next_page_token=page.next)

    async def DeleteDocuments(self, request: pb.DeleteDocumentsRequest, caller: Identity) -> pb.DeleteDocumentsResponse:
        """Some documents less."""
        if len(request.ids) > _MOST_IDS:
            raise InvalidArgument(f"at most {_MOST_IDS} ids a call", field="ids")
        memory = await self._worker.memory(caller, request.collection)
        missing = []
        for document in request.ids:
            try:
                await asyncio.to_thread(memory.delete, document)
            except NotFound:
                missing.append(document)
        return pb.DeleteDocumentsResponse(deleted=len(request.ids) - len(missing), not_found=missing)

    async def Generate(self, request: pb.GenerateRequest, caller: Identity) -> AsyncGenerator[pb.GenerateResponse]:
        """Text that goes on from a prompt."""
        self._check_model(request.model)
        ids = await self._worker.text_prompt(request.prompt)
        with await self._worker.answer(caller, _question(request, ids)) as answer:
            async for event in self._events(answer, pb.GenerateResponse):
                yield event

    async def Chat(self, request: pb.ChatRequest, caller: Identity) -> AsyncGenerator[pb.ChatResponse]:
        """The answer to a chat's last message."""
        self._check_model(request.model)
        ids = await self._worker.chat_prompt([(one.role, one.content) for one in request.messages])
        with await self._worker.answer(caller, _question(request, ids)) as answer:
            async for event in self._events(answer, pb.ChatResponse):
                yield event

    def _check_model(self, name: str) -> None:
        if name:
            self._worker.check_model(name)

    async def _events(self, answer: Answer, kind: type[Response]) -> AsyncGenerator[Response]:
        while not isinstance(event := await answer.next(), Finished):
            yield kind(text=event.text)
        self._traffic.answered(event)
        yield kind(finished=write_finished(event))


def _question(request: pb.GenerateRequest | pb.ChatRequest, ids: tuple[int, ...]) -> Question:
    options = request.options
    return Question(
        ids,
        options.max_new_tokens or NEW_TOKENS,
        read_sampling(options),
        tuple(options.stop),
        read_look(request.look) if request.HasField("look") else None,
        request.conversation,
    )
