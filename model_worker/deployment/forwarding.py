"""The rpcs of model_worker.v1 where no model is: every call goes on to a replica, and its answers come back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Protocol

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from memory_service.errors import FotError, InvalidArgument
from memory_service.types.callers import Identity
from model_worker.api.limits import BATCH_BYTES, BATCH_DOCUMENTS
from model_worker.v1 import model_worker_pb2 as pb

_METHODS = pb.DESCRIPTOR.services_by_name["ModelWorker"].methods_by_name
PUT = "PutDocuments"


class Send(Protocol):
    """Brings a call to some replica; the same one for every call of a session."""

    def __call__(
        self, rpc: str, identity: Identity, requests: list[bytes], session: str
    ) -> AsyncGenerator[bytes | FotError]: ...


class Forwarder:
    """Has the methods of `Rpcs`; which ones there are, the contract says."""

    def __init__(self, send: Send):
        self._send = send
        for name, method in _METHODS.items():
            if name != PUT:
                setattr(self, name, self._streaming(name) if method.server_streaming else self._unary(name))

    async def PutDocuments(self, requests: AsyncIterator[pb.PutDocumentsRequest], caller: Identity) -> Message:
        """Documents, a batch of whole ones to a replica at a time."""
        total = pb.PutDocumentsResponse()
        async for batch in _batches(requests):
            told = await self._one(PUT, caller, [one.SerializeToString() for one in batch])
            for field in total.DESCRIPTOR.fields:
                setattr(total, field.name, getattr(total, field.name) + getattr(told, field.name))
        return total

    def _unary(self, rpc: str) -> Callable[[Message, Identity], Any]:
        async def call(request: Message, caller: Identity) -> Any:
            return await self._one(rpc, caller, [request.SerializeToString()])

        return call

    def _streaming(self, rpc: str) -> Callable[[Any, Identity], Any]:
        async def call(request: Any, caller: Identity) -> AsyncGenerator[Message]:
            # A conversation's sessions and window are where it was answered last.
            session = f"{caller.tenant}/{request.conversation}" if request.conversation else ""
            async for answer in self._answers(rpc, caller, [request.SerializeToString()], session):
                yield answer

        return call

    async def _one(self, rpc: str, caller: Identity, requests: list[bytes]) -> Any:
        answers = [answer async for answer in self._answers(rpc, caller, requests, "")]
        return answers[0]

    async def _answers(
        self, rpc: str, caller: Identity, requests: list[bytes], session: str
    ) -> AsyncGenerator[Message]:
        kind = GetMessageClass(_METHODS[rpc].output_type)
        answers = self._send(rpc, caller, requests, session)
        try:
            async for answer in answers:
                if isinstance(answer, FotError):
                    raise answer
                yield kind.FromString(answer)
        finally:
            await answers.aclose()


async def answer_here(
    rpcs: Any, rpc: str, identity: Identity, requests: list[bytes]
) -> AsyncGenerator[bytes | FotError]:
    """The answers of `Rpcs` to a forwarded call; an error that ends it comes as the last of them."""
    method = _METHODS[rpc]
    kind = GetMessageClass(method.input_type)
    read = [kind.FromString(one) for one in requests]
    try:
        if method.server_streaming:
            answers = getattr(rpcs, rpc)(read[0], identity)
            try:
                async for answer in answers:
                    yield answer.SerializeToString()
            finally:
                await answers.aclose()
        else:
            given = _each(read) if method.client_streaming else read[0]
            answer = await getattr(rpcs, rpc)(given, identity)
            yield answer.SerializeToString()
    except FotError as error:
        yield error


async def _each(messages: list[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


async def _batches(requests: AsyncIterator[pb.PutDocumentsRequest]) -> AsyncIterator[list[pb.PutDocumentsRequest]]:
    """Messages in batches that end with a whole document; each says what the first message said of all."""
    batch: list[pb.PutDocumentsRequest] = []
    size = documents = 0
    collection, replace, begun = "", False, False
    async for request in requests:
        if not begun:
            collection, replace, begun = request.collection, request.replace, True
        elif request.collection not in ("", collection):
            raise InvalidArgument("all documents of a call go to one collection", field="collection")
        if not batch:
            request.collection, request.replace = collection, replace
        batch.append(request)
        size += len(request.text)
        documents += not request.more
        if not request.more and (size >= BATCH_BYTES or documents >= BATCH_DOCUMENTS):
            yield batch
            batch, size, documents = [], 0, 0
    if batch:
        yield batch
