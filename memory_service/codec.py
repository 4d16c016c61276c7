"""Every verb as an rpc: its request and answer as protobuf, both ways. Client and server share the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from google.protobuf.message import DecodeError, Message

from memory_service import messages as m
from memory_service import verbs as v
from memory_service.checksums import crc32
from memory_service.errors import DataLoss, InvalidArgument
from memory_service.types import (
    MAX_GROUPS,
    Attended,
    AttendGroup,
    AttendOptions,
    Chunk,
    Document,
    Fetched,
    Page,
    TopTokens,
)
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire import INTEGERS, from_bytes, read_tensor, tensor_bytes, write_tensor

SERVICE = "memory_service.v1.MemoryService"
PIECE_BYTES = 1 << 20
UPLOAD_CHUNKS = f"/{SERVICE}/UploadChunks"
LEASE_S = 600.0


@dataclass(frozen=True, slots=True)
class Rpc:
    """How one verb travels. A streamed answer is several messages: `to_response` yields them, `from_response` joins."""

    verb: type[v.Verb[Any]]
    request: type[Message]
    response: type[Message]
    to_request: Callable[[Any], Message]
    from_request: Callable[[Any], v.Verb[Any]]
    to_response: Callable[[Any], Any]
    from_response: Callable[[Any], Any]
    streamed: bool = False

    @property
    def name(self) -> str:
        return self.verb.__name__

    @property
    def path(self) -> str:
        return f"/{SERVICE}/{self.name}"

    def encode_request(self, verb: v.Verb[Any]) -> bytes:
        """A verb as bytes. Raises InvalidArgument for values no request can hold, such as a negative layer."""
        try:
            return self.to_request(verb).SerializeToString()
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"the arguments of {self.name} are out of range: {error}") from error

    def decode_request(self, raw: bytes) -> v.Verb[Any]:
        """The verb in a request's bytes. Raises InvalidArgument if they are none."""
        return self.from_request(parse(self.request, raw))

    def encode_answer(self, answer: Any) -> bytes:
        """A unary answer as bytes."""
        return self.to_response(answer).SerializeToString()  # type: ignore[no-any-return]

    def encode_pieces(self, answer: Any) -> Iterator[bytes]:
        """A streamed answer as the bytes of its messages, each made when it is asked for."""
        return (piece.SerializeToString() for piece in self.to_response(answer))

    def decode_answer(self, raw: bytes) -> Any:
        """The answer in the bytes of a unary response."""
        return self.from_response(parse(self.response, raw))

    def decode_pieces(self, raws: Iterable[bytes]) -> Any:
        """The answer in the bytes of a streamed response's messages."""
        return self.from_response(parse(self.response, raw) for raw in raws)


def parse(kind: type[Message], raw: bytes) -> Any:
    """A message from its bytes. Raises InvalidArgument if they are none of this kind."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidArgument(f"these bytes are no {kind.DESCRIPTOR.name}") from error


# --- Documents ------------------------------------------------------------------------------------------------------


def _write_put(verb: v.PutDocument) -> Message:
    document = verb.document
    message = pb.PutDocumentRequest(
        memory=verb.memory,
        document=document.id,
        keys=write_tensor(document.keys),
        values=write_tensor(document.values),
        token_ids=None if document.token_ids is None else write_tensor(document.token_ids),
        fingerprint=m.write_fingerprint(verb.fingerprint),
        conflict=m.CONFLICT[verb.conflict],
        request_id=verb.request_id,
    )
    m.write_metadata(document.metadata, message.metadata)
    return message


def _read_put(r: pb.PutDocumentRequest) -> v.PutDocument:
    document = Document(
        id=r.document,
        keys=read_tensor(r.keys, "keys", "[L, H, T, D]"),
        values=read_tensor(r.values, "values", "[L, H, T, D]"),
        token_ids=read_tensor(r.token_ids, "token_ids", "[T]", INTEGERS) if r.HasField("token_ids") else None,
        metadata=m.read_metadata(r.metadata),
    )
    conflict = m.read_word(m.CONFLICTS, r.conflict, "conflict")
    return v.PutDocument(r.memory, document, m.read_fingerprint(r.fingerprint), conflict, r.request_id)


def _write_begin(verb: v.BeginUpload) -> Message:
    message = pb.BeginUploadRequest(
        memory=verb.memory,
        document=verb.document,
        tokens=verb.tokens,
        fingerprint=m.write_fingerprint(verb.fingerprint),
        conflict=m.CONFLICT[verb.conflict],
        request_id=verb.request_id,
    )
    m.write_metadata(verb.metadata, message.metadata)
    return message


def _read_begin(r: pb.BeginUploadRequest) -> v.BeginUpload:
    return v.BeginUpload(
        memory=r.memory,
        document=r.document,
        tokens=r.tokens,
        fingerprint=m.read_fingerprint(r.fingerprint),
        metadata=m.read_metadata(r.metadata),
        conflict=m.read_word(m.CONFLICTS, r.conflict, "conflict"),
        request_id=r.request_id,
    )


def _write_list_documents(verb: v.ListDocuments) -> Message:
    where = None if verb.where is None else m.write_filter(verb.where)
    return pb.ListDocumentsRequest(
        memory=verb.memory, where=where, page_size=verb.page_size, page_token=verb.page_token
    )


def _read_list_documents(r: pb.ListDocumentsRequest) -> v.ListDocuments:
    where = m.read_filter(r.where) if r.HasField("where") else None
    return v.ListDocuments(r.memory, where, r.page_size, r.page_token)


def _read_open_session(r: pb.OpenSessionRequest) -> v.OpenSession:
    lease_s = m.read_duration(r.lease) if r.HasField("lease") else LEASE_S
    return v.OpenSession(r.memory, m.read_fingerprint(r.fingerprint), lease_s)


def _read_appends(r: pb.AppendSessionsRequest) -> v.AppendSessions:
    m.check_count(len(r.appends), MAX_GROUPS, "appends")
    return v.AppendSessions(r.memory, tuple(map(m.read_append, r.appends)))


# --- Chunks ---------------------------------------------------------------------------------------------------------


class UploadPiece(NamedTuple):
    """A chunk and the upload it belongs to; empty names mean those of the stream's first message."""

    memory: str
    upload: str
    chunk: Chunk


_DATA_TAG = pb.UploadChunksRequest.DATA_FIELD_NUMBER << 3 | 2


def encode_chunk(memory: str, upload: str, chunk: Chunk) -> bytes:
    """An UploadChunksRequest's bytes, copying the chunk's data once where protobuf would twice."""
    head = pb.UploadChunksRequest(
        memory=memory, upload=upload, part=chunk.part, offset=chunk.offset, crc32=chunk.crc32
    ).SerializeToString()
    # Serialised messages concatenate: a field may simply follow.
    return b"".join((head, bytes((_DATA_TAG,)), _varint(len(chunk.data)), chunk.data))


def decode_chunk(raw: bytes) -> UploadPiece:
    """The chunk in an UploadChunksRequest's bytes. Its data is a view of them, where protobuf would copy it twice.

    Raises InvalidArgument if the bytes are no such message.
    """
    start, data_start = _find_trailing_data(raw)
    message = parse(pb.UploadChunksRequest, raw[:start])
    data = memoryview(raw)[data_start:] if start < len(raw) else message.data
    return UploadPiece(message.memory, message.upload, Chunk(message.part, message.offset, message.crc32, data))


def _find_trailing_data(raw: bytes) -> tuple[int, int]:
    """Where the data field starts, tag and content, if it ends the message; else twice the message's length."""
    at = 0
    try:
        while at < len(raw):
            tag, after_tag = _read_varint(raw, at)
            length, after = _read_varint(raw, after_tag)
            if tag == _DATA_TAG and after + length == len(raw):
                return at, after
            if tag & 7 not in (0, 2) or tag == _DATA_TAG:
                break
            at = after + length if tag & 7 == 2 else after
    except IndexError:
        pass  # Cut short; the parser says so.
    return len(raw), len(raw)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while raw[at] & 0x80 and shift < 63:
        number |= (raw[at] & 0x7F) << shift
        shift += 7
        at += 1
    return number | raw[at] << shift, at + 1


# --- Attention ------------------------------------------------------------------------------------------------------


def _write_attend(verb: v.Attend | v.Search, message: Any) -> Message:
    message.memory = verb.memory
    message.layer = verb.layer
    for group in verb.groups:
        m.write_group(group, message.groups.add())
    m.write_options(verb.options, message.options)
    return message  # type: ignore[no-any-return]


def _read_attend(r: Any) -> tuple[str, int, tuple[AttendGroup, ...], AttendOptions]:
    m.check_count(len(r.groups), MAX_GROUPS, "groups")
    return r.memory, r.layer, tuple(map(m.read_group, r.groups)), m.read_options(r.options)


def _write_attended(answers: tuple[Attended, ...]) -> Message:
    message = pb.AttendResponse()
    for answer in answers:
        m.write_attended(answer, message.answers.add())
    return message


def _write_found(answers: tuple[TopTokens, ...]) -> Message:
    message = pb.SearchResponse()
    for answer in answers:
        m.write_top_tokens(answer, message.answers.add())
    return message


def answer_bytes(verb: v.Verb[Any]) -> int:
    """Bytes that the tensors of an attention answer will take on the wire; 0 for other verbs."""
    if not isinstance(verb, v.Attend | v.Search):
        return 0
    rows = sum(group.queries.shape[0] * group.queries.shape[1] for group in verb.groups)
    dimensions = verb.groups[0].queries.shape[2] if verb.groups else 0
    top = verb.options.top_k * (4 + 8 + 4 + 4) if verb.options.tokens or isinstance(verb, v.Search) else 0
    attended = dimensions * verb.options.output_dtype.itemsize + 4 if isinstance(verb, v.Attend) else 0
    return rows * (top + attended)


# --- Fetch ----------------------------------------------------------------------------------------------------------


def _write_fetched(fetched: Fetched) -> Iterator[Message]:
    heads, tokens, head_dim = fetched.keys.shape
    dtype = write_tensor(fetched.keys[:0]).dtype
    layout = pb.FetchLayout(
        dtype=dtype, kv_heads=heads, tokens=tokens, head_dim=head_dim, first_token=fetched.first_token
    )
    # The layout goes with the keys' first bytes, or alone where there are none.
    if not fetched.keys.numel():
        yield pb.FetchResponse(layout=layout)
    for number, data in enumerate(_cut((fetched.keys, fetched.values, fetched.token_ids.to(torch.int64)))):
        yield pb.FetchResponse(layout=None if number else layout, data=data, crc32=crc32(data))


def _cut(tensors: Iterable[torch.Tensor]) -> Iterator[bytes]:
    for tensor in tensors:
        plane = memoryview(tensor_bytes(tensor))
        yield from (bytes(plane[at : at + PIECE_BYTES]) for at in range(0, len(plane), PIECE_BYTES))


def _read_fetched(pieces: Iterable[pb.FetchResponse]) -> Fetched:
    layout, payload = pb.FetchLayout(), bytearray()
    for piece in pieces:
        if piece.HasField("layout"):
            layout = piece.layout
        data = piece.data
        if crc32(data) != piece.crc32:
            raise DataLoss("a fetched piece does not match its checksum; fetch again")
        payload += data
    dtype = m.read_word(m.DTYPES, layout.dtype, "layout.dtype").torch
    shape = (layout.kv_heads, layout.tokens, layout.head_dim)
    plane = layout.kv_heads * layout.tokens * layout.head_dim * dtype.itemsize
    if len(payload) != 2 * plane + 8 * layout.tokens:
        raise DataLoss("the fetched stream ended early; fetch again")
    planes = from_bytes(payload, torch.uint8, (len(payload),))
    return Fetched(
        keys=planes[:plane].view(dtype).reshape(shape),
        values=planes[plane : 2 * plane].view(dtype).reshape(shape),
        token_ids=from_bytes(payload[2 * plane :], torch.int64, (layout.tokens,)),
        first_token=layout.first_token,
    )


# --- The table ------------------------------------------------------------------------------------------------------


def _nothing(message: Any) -> None:
    return None


def _rpc(
    verb: type[v.Verb[Any]],
    request: type[Message],
    response: type[Message],
    to_request: Callable[[Any], Message],
    from_request: Callable[[Any], v.Verb[Any]],
    to_response: Callable[[Any], Any],
    from_response: Callable[[Any], Any],
    streamed: bool = False,
) -> tuple[type[v.Verb[Any]], Rpc]:
    return verb, Rpc(verb, request, response, to_request, from_request, to_response, from_response, streamed)


RPCS: Mapping[type[v.Verb[Any]], Rpc] = dict(
    (
        _rpc(
            v.CreateMemory,
            pb.CreateMemoryRequest,
            pb.CreateMemoryResponse,
            lambda verb: pb.CreateMemoryRequest(name=verb.name, spec=m.write_spec(verb.spec)),
            lambda r: v.CreateMemory(r.name, m.read_spec(r.spec)),
            lambda a: pb.CreateMemoryResponse(memory=m.write_memory(a)),
            lambda r: m.read_memory(r.memory),
        ),
        _rpc(
            v.GetMemory,
            pb.GetMemoryRequest,
            pb.GetMemoryResponse,
            lambda verb: pb.GetMemoryRequest(name=verb.name),
            lambda r: v.GetMemory(r.name),
            lambda a: pb.GetMemoryResponse(memory=m.write_memory(a)),
            lambda r: m.read_memory(r.memory),
        ),
        _rpc(
            v.ListMemories,
            pb.ListMemoriesRequest,
            pb.ListMemoriesResponse,
            lambda verb: pb.ListMemoriesRequest(page_size=verb.page_size, page_token=verb.page_token),
            lambda r: v.ListMemories(r.page_size, r.page_token),
            lambda a: pb.ListMemoriesResponse(memories=map(m.write_memory, a.items), next_page_token=a.next),
            lambda r: Page(tuple(map(m.read_memory, r.memories)), r.next_page_token),
        ),
        _rpc(
            v.DeleteMemory,
            pb.DeleteMemoryRequest,
            pb.DeleteMemoryResponse,
            lambda verb: pb.DeleteMemoryRequest(name=verb.name),
            lambda r: v.DeleteMemory(r.name),
            lambda a: pb.DeleteMemoryResponse(),
            _nothing,
        ),
        _rpc(
            v.PutDocument,
            pb.PutDocumentRequest,
            pb.PutDocumentResponse,
            _write_put,
            _read_put,
            lambda a: pb.PutDocumentResponse(document=m.write_document(a)),
            lambda r: m.read_document(r.document),
        ),
        _rpc(
            v.BeginUpload,
            pb.BeginUploadRequest,
            pb.BeginUploadResponse,
            _write_begin,
            _read_begin,
            lambda a: pb.BeginUploadResponse(upload=m.write_upload(a)),
            lambda r: m.read_upload(r.upload),
        ),
        _rpc(
            v.GetUpload,
            pb.GetUploadRequest,
            pb.GetUploadResponse,
            lambda verb: pb.GetUploadRequest(memory=verb.memory, upload=verb.upload),
            lambda r: v.GetUpload(r.memory, r.upload),
            lambda a: pb.GetUploadResponse(upload=m.write_upload(a)),
            lambda r: m.read_upload(r.upload),
        ),
        _rpc(
            v.CommitUpload,
            pb.CommitUploadRequest,
            pb.CommitUploadResponse,
            lambda verb: pb.CommitUploadRequest(memory=verb.memory, upload=verb.upload),
            lambda r: v.CommitUpload(r.memory, r.upload),
            lambda a: pb.CommitUploadResponse(document=m.write_document(a)),
            lambda r: m.read_document(r.document),
        ),
        _rpc(
            v.AbortUpload,
            pb.AbortUploadRequest,
            pb.AbortUploadResponse,
            lambda verb: pb.AbortUploadRequest(memory=verb.memory, upload=verb.upload),
            lambda r: v.AbortUpload(r.memory, r.upload),
            lambda a: pb.AbortUploadResponse(),
            _nothing,
        ),
        _rpc(
            v.GetDocument,
            pb.GetDocumentRequest,
            pb.GetDocumentResponse,
            lambda verb: pb.GetDocumentRequest(memory=verb.memory, document=verb.document),
            lambda r: v.GetDocument(r.memory, r.document),
            lambda a: pb.GetDocumentResponse(document=m.write_document(a)),
            lambda r: m.read_document(r.document),
        ),
        _rpc(
            v.ListDocuments,
            pb.ListDocumentsRequest,
            pb.ListDocumentsResponse,
            _write_list_documents,
            _read_list_documents,
            lambda a: pb.ListDocumentsResponse(documents=map(m.write_document, a.items), next_page_token=a.next),
            lambda r: Page(tuple(map(m.read_document, r.documents)), r.next_page_token),
        ),
        _rpc(
            v.DeleteDocument,
            pb.DeleteDocumentRequest,
            pb.DeleteDocumentResponse,
            lambda verb: pb.DeleteDocumentRequest(
                memory=verb.memory, document=verb.document, request_id=verb.request_id
            ),
            lambda r: v.DeleteDocument(r.memory, r.document, r.request_id),
            lambda a: pb.DeleteDocumentResponse(),
            _nothing,
        ),
        _rpc(
            v.OpenSession,
            pb.OpenSessionRequest,
            pb.OpenSessionResponse,
            lambda verb: pb.OpenSessionRequest(
                memory=verb.memory,
                fingerprint=m.write_fingerprint(verb.fingerprint),
                lease=m.write_duration(verb.lease_s, "lease"),
            ),
            _read_open_session,
            lambda a: pb.OpenSessionResponse(session=m.write_session(a)),
            lambda r: m.read_session(r.session),
        ),
        _rpc(
            v.AppendSessions,
            pb.AppendSessionsRequest,
            pb.AppendSessionsResponse,
            lambda verb: pb.AppendSessionsRequest(memory=verb.memory, appends=map(m.write_append, verb.appends)),
            _read_appends,
            lambda a: pb.AppendSessionsResponse(sessions=map(m.write_session, a)),
            lambda r: tuple(map(m.read_session, r.sessions)),
        ),
        _rpc(
            v.RenewSession,
            pb.RenewSessionRequest,
            pb.RenewSessionResponse,
            lambda verb: pb.RenewSessionRequest(memory=verb.memory, session=verb.session),
            lambda r: v.RenewSession(r.memory, r.session),
            lambda a: pb.RenewSessionResponse(session=m.write_session(a)),
            lambda r: m.read_session(r.session),
        ),
        _rpc(
            v.CloseSession,
            pb.CloseSessionRequest,
            pb.CloseSessionResponse,
            lambda verb: pb.CloseSessionRequest(memory=verb.memory, session=verb.session),
            lambda r: v.CloseSession(r.memory, r.session),
            lambda a: pb.CloseSessionResponse(),
            _nothing,
        ),
        _rpc(
            v.Attend,
            pb.AttendRequest,
            pb.AttendResponse,
            lambda verb: _write_attend(verb, pb.AttendRequest()),
            lambda r: v.Attend(*_read_attend(r)),
            _write_attended,
            lambda r: tuple(map(m.read_attended, r.answers)),
        ),
        _rpc(
            v.Search,
            pb.SearchRequest,
            pb.SearchResponse,
            lambda verb: _write_attend(verb, pb.SearchRequest()),
            lambda r: v.Search(*_read_attend(r)),
            _write_found,
            lambda r: tuple(map(m.read_top_tokens, r.answers)),
        ),
        _rpc(
            v.Fetch,
            pb.FetchRequest,
            pb.FetchResponse,
            lambda verb: pb.FetchRequest(
                memory=verb.memory,
                source=verb.source,
                layer=verb.layer,
                first_token=verb.first_token,
                tokens=verb.tokens,
            ),
            lambda r: v.Fetch(r.memory, r.source, r.layer, r.first_token, r.tokens),
            _write_fetched,
            _read_fetched,
            streamed=True,
        ),
        _rpc(
            v.GetStats,
            pb.GetStatsRequest,
            pb.GetStatsResponse,
            lambda verb: pb.GetStatsRequest(memory=verb.memory),
            lambda r: v.GetStats(r.memory),
            lambda a: pb.GetStatsResponse(stats=m.write_stats(a)),
            lambda r: m.read_stats(r.stats),
        ),
        _rpc(
            v.StartOperation,
            pb.StartOperationRequest,
            pb.StartOperationResponse,
            lambda verb: pb.StartOperationRequest(memory=verb.memory, kind=m.OPERATION_KIND[verb.kind]),
            lambda r: v.StartOperation(r.memory, m.read_word(m.OPERATION_KINDS, r.kind, "kind")),
            lambda a: pb.StartOperationResponse(operation=m.write_operation(a)),
            lambda r: m.read_operation(r.operation),
        ),
        _rpc(
            v.GetOperation,
            pb.GetOperationRequest,
            pb.GetOperationResponse,
            lambda verb: pb.GetOperationRequest(operation=verb.operation),
            lambda r: v.GetOperation(r.operation),
            lambda a: pb.GetOperationResponse(operation=m.write_operation(a)),
            lambda r: m.read_operation(r.operation),
        ),
        _rpc(
            v.ListOperations,
            pb.ListOperationsRequest,
            pb.ListOperationsResponse,
            lambda verb: pb.ListOperationsRequest(
                memory=verb.memory, page_size=verb.page_size, page_token=verb.page_token
            ),
            lambda r: v.ListOperations(r.memory, r.page_size, r.page_token),
            lambda a: pb.ListOperationsResponse(operations=map(m.write_operation, a.items), next_page_token=a.next),
            lambda r: Page(tuple(map(m.read_operation, r.operations)), r.next_page_token),
        ),
        _rpc(
            v.CancelOperation,
            pb.CancelOperationRequest,
            pb.CancelOperationResponse,
            lambda verb: pb.CancelOperationRequest(operation=verb.operation),
            lambda r: v.CancelOperation(r.operation),
            lambda a: pb.CancelOperationResponse(operation=m.write_operation(a)),
            lambda r: m.read_operation(r.operation),
        ),
    )
)
