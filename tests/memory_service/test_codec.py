"""Every verb and every answer survives the wire, and hostile bytes do not get in."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memory_service import verbs as v
from memory_service.errors import DataLoss, InvalidArgument
from memory_service.shards import Member, Placement, Shard, ShardMap
from memory_service.types.answers import Attended, Attribution, Coverage, Fetched, Measured, TopTokens
from memory_service.types.conditions import AllOf, AnyOf, Compare, Condition, Not, Scalar
from memory_service.types.documents import Conflict, Deleted, Document, DocumentInfo
from memory_service.types.listings import Page
from memory_service.types.memories import MemoryInfo, Stats
from memory_service.types.operations import Operation, OperationKind, OperationState
from memory_service.types.questions import MAX_TOP_K, AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope, SessionScope
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.types.snapshots import Snapshot
from memory_service.types.specs import DType, Fingerprint, IndexPolicy, MemorySpec
from memory_service.types.uploads import Chunk, Upload
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire.chunks import UploadPiece, decode_chunk, encode_chunk
from memory_service.wire.codec import (
    PIECE_BYTES,
    RPCS,
    SERVICE,
    UPLOAD_CHUNKS,
    Rpc,
    answer_bytes,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
COUNT = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["C"]), max_size=12)
TIME = st.floats(1e9, 4e9)
LEASE = st.integers(0, 10**9).map(lambda milliseconds: milliseconds / 1000)
SCALAR = TEXT | INT64 | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
METADATA = st.dictionaries(TEXT, SCALAR, max_size=3)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FINGERPRINT = st.builds(Fingerprint, TEXT, TEXT, TEXT, TEXT)


@st.composite
def tensors(draw: st.DrawFn, dimensions: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), min_size=dimensions, max_size=dimensions))
    dtype = draw(st.sampled_from(dtypes))
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(dtype)


IDS = st.none() | tensors(1, (torch.int32, torch.int64))
CONDITION = st.builds(
    lambda key, compare, values: Condition(key, compare, _values_for(compare, values)),
    TEXT,
    st.sampled_from(Compare),
    st.lists(SCALAR, min_size=1, max_size=3),
)
FILTER = st.recursive(
    CONDITION,
    lambda inner: (
        st.builds(Not, inner)
        | st.builds(AllOf, st.lists(inner, max_size=2).map(tuple))
        | st.builds(AnyOf, st.lists(inner, max_size=2).map(tuple))
    ),
    max_leaves=4,
)
SCOPE = st.builds(
    Scope,
    st.none() | st.lists(TEXT, max_size=2).map(tuple),
    st.none() | FILTER,
    st.lists(st.builds(SessionScope, TEXT, st.none() | COUNT, COUNT), max_size=2).map(tuple),
)
OPTIONS = st.builds(
    AttendOptions,
    top_k=st.integers(0, MAX_TOP_K),
    engine=st.sampled_from(Engine),
    scale=st.none() | st.floats(0.01, 10),
    logit_gap=st.none() | st.floats(0, 10),
    search=st.dictionaries(TEXT, st.floats(0, 100), max_size=2),
    tokens=st.booleans(),
    attribution=st.booleans(),
    measure=st.booleans(),
    output_dtype=st.sampled_from(DType),
)
SPEC = st.builds(
    MemorySpec,
    FINGERPRINT,
    st.lists(st.integers(0, 255), max_size=3).map(tuple),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(DType),
    st.builds(IndexPolicy, TEXT, INT64),
)
MEMORY = st.builds(MemoryInfo, TEXT, SPEC, TIME, COUNT, COUNT, COUNT)
DOCUMENT = st.builds(DocumentInfo, TEXT, COUNT, METADATA, COUNT, TIME)
RANGE = st.tuples(st.integers(0, 2**32 - 1), COUNT, COUNT)
UPLOAD = st.builds(
    Upload,
    TEXT,
    COUNT,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(RANGE, max_size=3).map(tuple),
    TIME,
    st.none() | DOCUMENT,
)
SESSION = st.builds(SessionInfo, TEXT, TEXT, LEASE, TIME, st.lists(COUNT, max_size=3).map(tuple))
OPERATION = st.builds(
    Operation,
    TEXT,
    TEXT,
    st.sampled_from(OperationKind),
    st.sampled_from(OperationState),
    COUNT,
    COUNT,
    TEXT,
    TIME,
    TIME,
    TEXT,
)
SNAPSHOT = st.builds(
    Snapshot, TEXT, TEXT, TIME, COUNT, COUNT, COUNT, TEXT, *[st.lists(TEXT, max_size=2).map(tuple)] * 2, TEXT
)
TOP_TOKENS = st.builds(
    TopTokens,
    st.lists(TEXT, max_size=2).map(tuple),
    tensors(3, (torch.int32,)),
    tensors(3, (torch.int64,)),
    tensors(3, (torch.float32,)),
    tensors(3, (torch.float32,)),
)
ATTENDED = st.builds(
    Attended,
    tensors(3),
    tensors(2, (torch.float32,)),
    st.builds(Coverage, COUNT, COUNT),
    TEXT,
    st.none() | TOP_TOKENS,
    st.none() | st.lists(st.builds(Attribution, TEXT, st.floats(0, 1)), max_size=2).map(tuple),
    st.none() | st.builds(Measured, st.floats(0, 1), st.floats(0, 1)),
)
SHARES = (st.none() | tensors(2, (torch.int32,)), st.none() | tensors(2, (torch.float32,)))
GROUPS = st.lists(st.builds(AttendGroup, SCOPE, tensors(3), *SHARES), max_size=2).map(tuple)
SHARDS = st.lists(st.builds(Shard, TEXT, st.lists(TEXT, max_size=2).map(tuple)), max_size=2).map(tuple)
MAP = st.builds(ShardMap, COUNT, SHARDS, SHARDS, st.booleans())
MEMBER = st.builds(Member, st.none() | MAP, TEXT, st.booleans(), COUNT)
PLACEMENT = st.none() | st.builds(Placement, TEXT, st.lists(TEXT, min_size=1, max_size=2).map(tuple))
APPEND = st.builds(
    SessionAppend, TEXT, st.lists(st.integers(0, 99), max_size=2).map(tuple), COUNT, tensors(4), tensors(4), IDS
)
LAYER = st.integers(0, 2**32 - 1)


@st.composite
def fetches(draw: st.DrawFn) -> Fetched:
    keys = draw(tensors(3))
    ids = torch.arange(keys.shape[1], dtype=torch.int64)
    return Fetched(keys, keys.flip(0), ids, draw(COUNT))


def pages(item: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(Page, st.lists(item, max_size=2).map(tuple), TEXT)


CASES: dict[type[v.Verb[Any]], tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]] = {
    v.CreateMemory: (st.builds(v.CreateMemory, TEXT, SPEC, TIME), MEMORY),
    v.GetMemory: (st.builds(v.GetMemory, TEXT, PLACEMENT), MEMORY),
    v.ListMemories: (st.builds(v.ListMemories, st.integers(-9, 999), TEXT, PLACEMENT), pages(MEMORY)),
    v.DeleteMemory: (st.builds(v.DeleteMemory, TEXT), st.none()),
    v.PutDocument: (
        st.builds(
            v.PutDocument,
            TEXT,
            st.builds(Document, TEXT, tensors(4), tensors(4), IDS, METADATA),
            FINGERPRINT,
            st.sampled_from(Conflict),
            TEXT,
            COUNT,
        ),
        DOCUMENT,
    ),
    v.BeginUpload: (
        st.builds(v.BeginUpload, TEXT, TEXT, INT64, FINGERPRINT, METADATA, st.sampled_from(Conflict), TEXT, COUNT),
        UPLOAD,
    ),
    v.GetUpload: (st.builds(v.GetUpload, TEXT, TEXT), UPLOAD),
    v.CommitUpload: (st.builds(v.CommitUpload, TEXT, TEXT), DOCUMENT),
    v.AbortUpload: (st.builds(v.AbortUpload, TEXT, TEXT), st.none()),
    v.GetDocument: (st.builds(v.GetDocument, TEXT, TEXT), DOCUMENT),
    v.ListDocuments: (
        st.builds(v.ListDocuments, TEXT, st.none() | FILTER, st.integers(-9, 999), TEXT),
        pages(DOCUMENT),
    ),
    v.DeleteDocument: (st.builds(v.DeleteDocument, TEXT, TEXT, TEXT, COUNT), st.none()),
    v.ListDeleted: (
        st.builds(v.ListDeleted, TEXT, st.integers(-9, 999), TEXT),
        pages(st.builds(Deleted, TEXT, COUNT)),
    ),
    v.OpenSession: (st.builds(v.OpenSession, TEXT, FINGERPRINT, LEASE, TEXT), SESSION),
    v.AppendSessions: (
        st.builds(v.AppendSessions, TEXT, st.lists(APPEND, max_size=2).map(tuple)),
        st.lists(SESSION, max_size=2).map(tuple),
    ),
    v.RenewSession: (st.builds(v.RenewSession, TEXT, TEXT), SESSION),
    v.CloseSession: (st.builds(v.CloseSession, TEXT, TEXT), st.none()),
    v.Attend: (st.builds(v.Attend, TEXT, LAYER, GROUPS, OPTIONS, PLACEMENT), st.lists(ATTENDED, max_size=2).map(tuple)),
    v.Search: (
        st.builds(v.Search, TEXT, LAYER, GROUPS, OPTIONS, PLACEMENT),
        st.lists(TOP_TOKENS, max_size=2).map(tuple),
    ),
    v.Fetch: (st.builds(v.Fetch, TEXT, TEXT, LAYER, INT64, INT64), fetches()),
    v.GetStats: (st.builds(v.GetStats, TEXT, PLACEMENT), st.builds(Stats, TEXT, *[COUNT] * 11)),
    v.StartOperation: (st.builds(v.StartOperation, TEXT, st.sampled_from(OperationKind), TEXT), OPERATION),
    v.GetOperation: (st.builds(v.GetOperation, TEXT), OPERATION),
    v.ListOperations: (st.builds(v.ListOperations, TEXT, st.integers(-9, 999), TEXT), pages(OPERATION)),
    v.CancelOperation: (st.builds(v.CancelOperation, TEXT), OPERATION),
    v.CreateSnapshot: (st.builds(v.CreateSnapshot, TEXT, TEXT, LEASE), OPERATION),
    v.ReleaseHold: (st.builds(v.ReleaseHold, TEXT), OPERATION),
    v.GetSnapshot: (st.builds(v.GetSnapshot, TEXT), SNAPSHOT),
    v.ListSnapshots: (st.builds(v.ListSnapshots, TEXT, st.integers(-9, 999), TEXT), pages(SNAPSHOT)),
    v.DeleteSnapshot: (st.builds(v.DeleteSnapshot, TEXT), st.none()),
    v.RestoreSnapshot: (st.builds(v.RestoreSnapshot, TEXT, TEXT), OPERATION),
    v.GetShardMap: (st.just(v.GetShardMap()), MEMBER),
    v.SetShardMap: (st.builds(v.SetShardMap, MAP, TEXT, st.none() | st.booleans(), COUNT), MEMBER),
    v.MarkBehind: (st.builds(v.MarkBehind, COUNT), st.none()),
}
EVERY_RPC = pytest.mark.parametrize("rpc", RPCS.values(), ids=lambda rpc: rpc.name)
quick = settings(max_examples=25, deadline=None)


def _values_for(compare: Compare, values: list[Scalar]) -> tuple[Scalar, ...]:
    return {Compare.IN: tuple(values), Compare.EXISTS: ()}.get(compare, (values[0],))


def same(a: Any, b: Any) -> bool:
    """Equality that looks into tensors and holds a flag apart from a number."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def answer_through(rpc: Rpc, answer: Any) -> Any:
    if rpc.streamed:
        return rpc.decode_pieces(list(rpc.encode_pieces(answer)))
    return rpc.decode_answer(rpc.encode_answer(answer))


def test_every_verb_has_an_rpc_and_every_rpc_of_the_proto_a_verb() -> None:
    verbs = {kind for kind in vars(v).values() if isinstance(kind, type) and issubclass(kind, v.Verb)} - {v.Verb}
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["MemoryService"].methods}
    assert set(RPCS) == verbs == set(CASES)
    assert {rpc.name for rpc in RPCS.values()} | {UPLOAD_CHUNKS.rpartition("/")[2]} == methods
    assert pb.DESCRIPTOR.services_by_name["MemoryService"].full_name == SERVICE


@EVERY_RPC
def test_request_and_response_are_the_ones_the_proto_names(rpc: Rpc) -> None:
    method = pb.DESCRIPTOR.services_by_name["MemoryService"].methods_by_name[rpc.name]
    assert (method.input_type, method.output_type) == (rpc.request.DESCRIPTOR, rpc.response.DESCRIPTOR)
    assert (method.client_streaming, method.server_streaming) == (False, rpc.streamed)


@EVERY_RPC
def test_a_verb_survives_the_wire(rpc: Rpc) -> None:
    @quick
    @given(CASES[rpc.verb][0])
    def check(verb: Any) -> None:
        assert same(verb, rpc.decode_request(rpc.encode_request(verb)))

    check()


@EVERY_RPC
def test_an_answer_survives_the_wire(rpc: Rpc) -> None:
    @quick
    @given(CASES[rpc.verb][1])
    def check(answer: Any) -> None:
        assert same(answer, answer_through(rpc, answer))

    check()


@EVERY_RPC
def test_any_bytes_decode_or_are_an_invalid_argument(rpc: Rpc) -> None:
    @quick
    @given(st.binary(max_size=64))
    def check(raw: bytes) -> None:
        with contextlib.suppress(InvalidArgument):
            rpc.decode_request(raw)

    check()


def test_what_is_left_out_of_a_request_has_the_documented_default() -> None:
    fingerprint = Fingerprint("")
    assert RPCS[v.ListMemories].from_request(pb.ListMemoriesRequest()) == v.ListMemories(page_size=0)
    assert RPCS[v.ListDocuments].from_request(pb.ListDocumentsRequest(memory="m")) == v.ListDocuments("m", page_size=0)
    assert RPCS[v.OpenSession].from_request(pb.OpenSessionRequest(memory="m")) == v.OpenSession("m", fingerprint)
    assert RPCS[v.BeginUpload].from_request(pb.BeginUploadRequest()) == v.BeginUpload("", "", 0, fingerprint)
    attend = RPCS[v.Attend].from_request(pb.AttendRequest(groups=[pb.AttendGroup(queries=_tensor([1, 1, 2]))]))
    assert isinstance(attend, v.Attend)
    assert attend.options == AttendOptions()
    assert attend.groups[0].scope == Scope()
    spec = pb.MemorySpec(fingerprint=pb.Fingerprint(model="m"), layers=[1], kv_heads=2, head_dim=3)
    created = RPCS[v.CreateMemory].from_request(pb.CreateMemoryRequest(name="m", spec=spec))
    assert created == v.CreateMemory("m", MemorySpec(Fingerprint("m"), (1,), 2, 3))


def test_values_no_request_can_hold_are_invalid_arguments() -> None:
    for verb in (
        v.Fetch("m", "d", layer=-1),
        v.ListMemories(page_size=2**40),
        v.OpenSession("m", Fingerprint("x"), lease_s=float("nan")),
        v.BeginUpload("m", "d", 1, Fingerprint("x"), metadata={"n": 2**70}),
        v.BeginUpload("m", "d", 1, Fingerprint("x"), metadata={"n": [1]}),  # type: ignore[dict-item]
        v.GetMemory("\ud800"),
    ):
        with pytest.raises(InvalidArgument):
            RPCS[type(verb)].encode_request(verb)


def _tensor(shape: list[int]) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=shape, raw=bytes(4 * torch.Size(shape).numel()))


def _nested(depth: int) -> pb.Filter:
    where = pb.Filter(condition=pb.Condition(key="k", compare=pb.COMPARE_EXISTS))
    for _ in range(depth - 1):
        where = pb.Filter(negated=where)
    return where


FILTERS: dict[str, Callable[[], pb.Filter]] = {
    "empty": pb.Filter,
    "empty part": lambda: pb.Filter(all_of=pb.Filters(parts=[pb.Filter()])),
    "too deep": lambda: _nested(33),
    "too many parts": lambda: pb.Filter(any_of=pb.Filters(parts=[_nested(1)] * 1024)),
    "no comparison": lambda: pb.Filter(condition=pb.Condition(key="k")),
    "no value": lambda: pb.Filter(condition=pb.Condition(key="k", compare=pb.COMPARE_LT)),
    "unset value": lambda: pb.Filter(condition=pb.Condition(key="k", compare=pb.COMPARE_EQ, values=[pb.Scalar()])),
    "nan": lambda: pb.Filter(
        condition=pb.Condition(key="k", compare=pb.COMPARE_EQ, values=[pb.Scalar(number=float("nan"))])
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_that_says_nothing_or_too_much_is_an_invalid_argument(name: str) -> None:
    with pytest.raises(InvalidArgument):
        RPCS[v.ListDocuments].from_request(pb.ListDocumentsRequest(memory="m", where=FILTERS[name]()))


def test_a_filter_of_the_greatest_depth_is_read() -> None:
    raw = pb.ListDocumentsRequest(memory="m", where=_nested(32)).SerializeToString()
    assert isinstance(RPCS[v.ListDocuments].decode_request(raw), v.ListDocuments)


@quick
@given(TEXT, TEXT, st.integers(0, 2**32 - 1), COUNT, st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_a_chunk_is_written_and_read_as_protobuf_would(
    memory: str, upload: str, part: int, offset: int, crc32: int, data: bytes
) -> None:
    piece = UploadPiece(memory, upload, Chunk(part, offset, crc32, data))
    message = pb.UploadChunksRequest(memory=memory, upload=upload, part=part, offset=offset, crc32=crc32, data=data)
    raw = encode_chunk(memory, upload, piece.chunk)
    assert pb.UploadChunksRequest.FromString(raw) == message
    assert decode_chunk(raw) == piece
    assert decode_chunk(message.SerializeToString()) == piece


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=20))
def test_any_bytes_are_the_chunk_that_protobuf_reads_or_an_invalid_argument(head: bytes, data: bytes) -> None:
    raw = head + encode_chunk("m", "u", Chunk(1, 2, 3, data))[2:]
    try:
        message = pb.UploadChunksRequest.FromString(raw)
    except Exception:
        with pytest.raises(InvalidArgument):
            decode_chunk(raw)
        return
    chunk = Chunk(message.part, message.offset, message.crc32, message.data)
    assert decode_chunk(raw) == UploadPiece(message.memory, message.upload, chunk)


def test_a_chunk_whose_data_comes_first_or_twice_is_read_as_protobuf_would() -> None:
    data = pb.UploadChunksRequest(data=b"early").SerializeToString()
    head = pb.UploadChunksRequest(memory="m", offset=7).SerializeToString()
    assert decode_chunk(data + head).chunk.data == b"early"
    assert decode_chunk(data + head + pb.UploadChunksRequest(data=b"late").SerializeToString()).chunk.data == b"late"


def test_a_large_fetch_travels_in_pieces_and_a_damaged_or_lost_one_is_noticed() -> None:
    keys = torch.randn(2, 3000, 64, generator=torch.Generator().manual_seed(0))
    fetched = Fetched(keys, keys + 1, torch.arange(3000), first_token=5)
    pieces = list(RPCS[v.Fetch].to_response(fetched))
    assert len(pieces) == 5
    assert all(len(piece.data) <= PIECE_BYTES for piece in pieces)
    assert same(fetched, RPCS[v.Fetch].from_response(pieces))
    with pytest.raises(DataLoss):
        RPCS[v.Fetch].from_response(pieces[:-1])
    damaged = pb.FetchResponse(data=b"x" + pieces[1].data[1:], crc32=zlib.crc32(pieces[1].data))
    with pytest.raises(DataLoss):
        RPCS[v.Fetch].from_response([pieces[0], damaged, *pieces[2:]])


def test_the_bytes_of_an_answer_are_known_before_it_is_computed() -> None:
    group = AttendGroup(Scope(), torch.zeros(4, 3, 64))
    attend = v.Attend("m", 0, (group, group), AttendOptions())
    assert answer_bytes(attend) == 2 * 12 * (64 * 4 + 4)
    search = v.Search("m", 0, (group,), AttendOptions(top_k=8))
    assert answer_bytes(search) == 12 * 8 * 20
    assert answer_bytes(v.GetStats()) == 0
