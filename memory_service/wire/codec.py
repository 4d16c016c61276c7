"""Every verb as an rpc: its request and answer as protobuf, both ways. Client and server share the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from google.protobuf.message import Message

from memory_service import verbs as v
from memory_service.checksums import crc32
from memory_service.errors import DataLoss, InvalidArgument
from memory_service.shards import Placement
from memory_service.types.answers import Attended, Fetched, TopTokens
from memory_service.types.documents import Document
from memory_service.types.listings import Page
from memory_service.types.questions import MAX_GROUPS, AttendGroup, AttendOptions
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire import cluster_messages as c
from memory_service.wire import messages as m
from memory_service.wire import query_messages as q
from memory_service.wire.messages import parse
from memory_service.wire.tensors import INTEGERS, from_bytes, read_tensor, tensor_bytes, write_tensor

SERVICE = "memory_service.v1.MemoryService"
EPOCH = "fot-epoch"  # Metadata of a call by a client of a cluster: of the shard map it was routed by.
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


# --- Memories and documents -----------------------------------------------------------------------------------------


def _write_create(verb: v.CreateMemory) -> Message:
    created_at = m.write_time(verb.created_at) if verb.created_at else None
    return pb.CreateMemoryRequest(name=verb.name, spec=m.write_spec(verb.spec), created_at=created_at)


def _read_create(r: pb.CreateMemoryRequest) -> v.CreateMemory:
    created_at = m.read_time(r.created_at) if r.HasField("created_at") else 0.0
    return v.CreateMemory(r.name, m.read_spec(r.spec), created_at)


def _write_get_memory(verb: v.GetMemory) -> Message:
    return pb.GetMemoryRequest(name=verb.name, placement=c.write_placement(verb.placement))


def _write_list_memories(verb: v.ListMemories) -> Message:
    return pb.ListMemoriesRequest(
        page_size=verb.page_size, page_token=verb.page_token, placement=c.write_placement(verb.placement)
    )


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
        generation=verb.generation,
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
    return v.PutDocument(r.memory, document, m.read_fingerprint(r.fingerprint), conflict, r.request_id, r.generation)


def _write_begin(verb: v.BeginUpload) -> Message:
    message = pb.BeginUploadRequest(
        memory=verb.memory,
        document=verb.document,
        tokens=verb.tokens,
        fingerprint=m.write_fingerprint(verb.fingerprint),
        conflict=m.CONFLICT[verb.conflict],
        request_id=verb.request_id,
        generation=verb.generation,
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
        generation=r.generation,
    )


def _write_list(verb: v.ListDocuments) -> Message:
    where = None if verb.where is None else q.write_filter(verb.where)
    return pb.ListDocumentsRequest(
        memory=verb.memory, where=where, page_size=verb.page_size, page_token=verb.page_token
    )


def _read_list(r: pb.ListDocumentsRequest) -> v.ListDocuments:
    where = q.read_filter(r.where) if r.HasField("where") else None
    return v.ListDocuments(r.memory, where, r.page_size, r.page_token)


# --- Sessions and operations ----------------------------------------------------------------------------------------


def _write_open_session(verb: v.OpenSession) -> Message:
    lease = m.write_duration(verb.lease_s, "lease")
    return pb.OpenSessionRequest(
        memory=verb.memory, fingerprint=m.write_fingerprint(verb.fingerprint), lease=lease, session=verb.session
    )


def _read_open_session(r: pb.OpenSessionRequest) -> v.OpenSession:
    lease_s = m.read_duration(r.lease) if r.HasField("lease") else LEASE_S
    return v.OpenSession(r.memory, m.read_fingerprint(r.fingerprint), lease_s, r.session)


def _write_create_snapshot(verb: v.CreateSnapshot) -> Message:
    hold = m.write_duration(verb.hold_s, "hold") if verb.hold_s else None
    return pb.CreateSnapshotRequest(memory=verb.memory, snapshot=verb.snapshot, hold=hold)


def _read_create_snapshot(r: pb.CreateSnapshotRequest) -> v.CreateSnapshot:
    return v.CreateSnapshot(r.memory, r.snapshot, m.read_duration(r.hold))


def _write_appends(verb: v.AppendSessions) -> Message:
    return pb.AppendSessionsRequest(memory=verb.memory, appends=map(m.write_append, verb.appends))


def _read_appends(r: pb.AppendSessionsRequest) -> v.AppendSessions:
    m.check_count(len(r.appends), MAX_GROUPS, "appends")
    return v.AppendSessions(r.memory, tuple(map(m.read_append, r.appends)))


def _write_start(verb: v.StartOperation) -> Message:
    return pb.StartOperationRequest(memory=verb.memory, kind=m.OPERATION_KIND[verb.kind], factory=verb.factory)


def _read_start(r: pb.StartOperationRequest) -> v.StartOperation:
    return v.StartOperation(r.memory, m.read_word(m.OPERATION_KINDS, r.kind, "kind"), r.factory)


# --- Attention ------------------------------------------------------------------------------------------------------


def _write_attend(verb: v.Attend) -> Message:
    placement = c.write_placement(verb.placement)
    message = pb.AttendRequest(memory=verb.memory, layer=verb.layer, placement=placement)
    _write_query(verb, message)
    return message


def _write_search(verb: v.Search) -> Message:
    placement = c.write_placement(verb.placement)
    message = pb.SearchRequest(memory=verb.memory, layer=verb.layer, placement=placement)
    _write_query(verb, message)
    return message


def _write_query(verb: v.Attend | v.Search, message: pb.AttendRequest | pb.SearchRequest) -> None:
    for group in verb.groups:
        q.write_group(group, message.groups.add())
    q.write_options(verb.options, message.options)


def _read_query(r: Any) -> tuple[str, int, tuple[AttendGroup, ...], AttendOptions, Placement | None]:
    m.check_count(len(r.groups), MAX_GROUPS, "groups")
    groups = tuple(map(q.read_group, r.groups))
    return r.memory, r.layer, groups, q.read_options(r.options), c.read_placement(r)


def _write_attended(answers: tuple[Attended, ...], response: type[pb.AttendResponse]) -> Message:
    message = response()
    for answer in answers:
        q.write_attended(answer, message.answers.add())
    return message


def _write_found(answers: tuple[TopTokens, ...], response: type[pb.SearchResponse]) -> Message:
    message = response()
    for answer in answers:
        q.write_top_tokens(answer, message.answers.add())
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


def _write_fetched(fetched: Fetched, response: type[pb.FetchResponse]) -> Iterator[Message]:
    heads, tokens, head_dim = fetched.keys.shape
    dtype = write_tensor(fetched.keys[:0]).dtype
    layout = pb.FetchLayout(
        dtype=dtype, kv_heads=heads, tokens=tokens, head_dim=head_dim, first_token=fetched.first_token
    )
    # The layout goes with the keys' first bytes, or alone where there are none.
    if not fetched.keys.numel():
        yield response(layout=layout)
    for number, data in enumerate(_cut((fetched.keys, fetched.values, fetched.token_ids.to(torch.int64)))):
        yield response(layout=None if number else layout, data=data, crc32=crc32(data))


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


class _Answer(NamedTuple):
    """How an answer is written into a response of the given type, and read from it."""

    write: Callable[[Any, type[Any]], Any]
    read: Callable[[Any], Any]


def _one(field: str, write: Callable[[Any], Message], read: Callable[[Any], Any]) -> _Answer:
    """An answer that is one field of the response."""
    return _Answer(
        lambda answer, response: response(**{field: write(answer)}), lambda message: read(getattr(message, field))
    )


def _page(field: str, write: Callable[[Any], Message], read: Callable[[Any], Any]) -> _Answer:
    """A page of a listing."""
    return _Answer(
        lambda page, response: response(**{field: map(write, page.items), "next_page_token": page.next}),
        lambda message: Page(tuple(map(read, getattr(message, field))), message.next_page_token),
    )


_MEMORY = _one("memory", m.write_memory, m.read_memory)
_DOCUMENT = _one("document", m.write_document, m.read_document)
_UPLOAD = _one("upload", m.write_upload, m.read_upload)
_SESSION = _one("session", m.write_session, m.read_session)
_OPERATION = _one("operation", m.write_operation, m.read_operation)
_MEMBER = _Answer(lambda member, response: c.fill_member(member, response()), c.read_member)
_NOTHING = _Answer(lambda answer, response: response(), lambda message: None)
_MANY_SESSIONS = _Answer(
    lambda sessions, response: response(sessions=map(m.write_session, sessions)),
    lambda message: tuple(map(m.read_session, message.sessions)),
)
_ATTENDED = _Answer(_write_attended, lambda message: tuple(map(q.read_attended, message.answers)))
_FOUND = _Answer(_write_found, lambda message: tuple(map(q.read_top_tokens, message.answers)))
_FETCHED = _Answer(_write_fetched, _read_fetched)


def _rpc(
    verb: type[v.Verb[Any]],
    answer: _Answer,
    write: Callable[[Any], Message] | None = None,
    read: Callable[[Any], v.Verb[Any]] | None = None,
    streamed: bool = False,
) -> Rpc:
    """The rpc of a verb; without `write` and `read`, the verb's fields are the request's, as they are."""
    request, response = getattr(pb, f"{verb.__name__}Request"), getattr(pb, f"{verb.__name__}Response")
    names = tuple(field.name for field in fields(verb))
    return Rpc(
        verb,
        request,
        response,
        to_request=write or (lambda verb: request(**{name: getattr(verb, name) for name in names})),
        from_request=read or (lambda message: verb(**{name: getattr(message, name) for name in names})),
        to_response=lambda found: answer.write(found, response),
        from_response=answer.read,
        streamed=streamed,
    )


RPCS: Mapping[type[v.Verb[Any]], Rpc] = {
    rpc.verb: rpc
    for rpc in (
        _rpc(v.CreateMemory, _MEMORY, _write_create, _read_create),
        _rpc(v.GetMemory, _MEMORY, _write_get_memory, lambda r: v.GetMemory(r.name, c.read_placement(r))),
        _rpc(
            v.ListMemories,
            _page("memories", m.write_memory, m.read_memory),
            _write_list_memories,
            lambda r: v.ListMemories(r.page_size, r.page_token, c.read_placement(r)),
        ),
        _rpc(v.DeleteMemory, _NOTHING),
        _rpc(v.PutDocument, _DOCUMENT, _write_put, _read_put),
        _rpc(v.BeginUpload, _UPLOAD, _write_begin, _read_begin),
        _rpc(v.GetUpload, _UPLOAD),
        _rpc(v.CommitUpload, _DOCUMENT),
        _rpc(v.AbortUpload, _NOTHING),
        _rpc(v.GetDocument, _DOCUMENT),
        _rpc(v.ListDocuments, _page("documents", m.write_document, m.read_document), _write_list, _read_list),
        _rpc(v.DeleteDocument, _NOTHING),
        _rpc(v.ListDeleted, _page("deleted", m.write_deleted, m.read_deleted)),
        _rpc(v.OpenSession, _SESSION, _write_open_session, _read_open_session),
        _rpc(v.AppendSessions, _MANY_SESSIONS, _write_appends, _read_appends),
        _rpc(v.RenewSession, _SESSION),
        _rpc(v.CloseSession, _NOTHING),
        _rpc(v.Attend, _ATTENDED, _write_attend, lambda r: v.Attend(*_read_query(r))),
        _rpc(v.Search, _FOUND, _write_search, lambda r: v.Search(*_read_query(r))),
        _rpc(v.Fetch, _FETCHED, streamed=True),
        _rpc(
            v.GetStats,
            _one("stats", m.write_stats, m.read_stats),
            lambda verb: pb.GetStatsRequest(memory=verb.memory, placement=c.write_placement(verb.placement)),
            lambda r: v.GetStats(r.memory, c.read_placement(r)),
        ),
        _rpc(v.StartOperation, _OPERATION, _write_start, _read_start),
        _rpc(v.GetOperation, _OPERATION),
        _rpc(v.ListOperations, _page("operations", m.write_operation, m.read_operation)),
        _rpc(v.CancelOperation, _OPERATION),
        _rpc(v.CreateSnapshot, _OPERATION, _write_create_snapshot, _read_create_snapshot),
        _rpc(v.ReleaseHold, _OPERATION),
        _rpc(v.GetSnapshot, _one("snapshot", m.write_snapshot, m.read_snapshot)),
        _rpc(v.ListSnapshots, _page("snapshots", m.write_snapshot, m.read_snapshot)),
        _rpc(v.DeleteSnapshot, _NOTHING),
        _rpc(v.RestoreSnapshot, _OPERATION),
        _rpc(v.GetShardMap, _MEMBER),
        _rpc(v.SetShardMap, _MEMBER, c.write_set_map, c.read_set_map),
        _rpc(v.MarkBehind, _NOTHING),
    )
}
