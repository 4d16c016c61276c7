"""How a document's bytes lie in a segment file: parts, their chunks, and the header that describes them. No I/O here.

L memory layers, H key/value heads, T tokens, D head_dim. A part's payload is keys [L, H, T, D] ‖ values [L, H, T, D] ‖
token ids [T] uint32, little-endian, contiguous. A segment file is a valid safetensors file: 8 bytes of header length,
the header's JSON padded with spaces, then the parts' payloads one after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from memory_service.checksums import crc32
from memory_service.errors import DataLoss, InvalidArgument
from memory_service.types.conditions import Scalar
from memory_service.types.specs import DType, Fingerprint, IndexPolicy, MemorySpec

CHUNK_BYTES = 1 << 20
PART_BYTES = 256 << 20
SMALL_PART_BYTES = 4 << 20  # Up to here a part waits in RAM and shares a segment with others.
HEADER_STEP = 4096
# A part staged in a file leaves this room before its header is known. Metadata and document id at their limits, escaped
# twice (they are JSON in a string of JSON), and the checksums of 256 chunks stay below.
FILE_HEADER_BYTES = 256 << 10
MAX_HEADER_BYTES = 64 << 20
FORMAT = "fot.segment.v1"
SEGMENT_NAME = re.compile(r"seg-[0-9a-f]{28}\.safetensors")

Which = Literal["keys", "values"]
_SAFETENSORS_DTYPE = {DType.BF16: "BF16", DType.F16: "F16", DType.F32: "F32"}


class Extent(NamedTuple):
    """A run of bytes in a part's payload."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PartLayout:
    """Where everything stands in a part's payload."""

    layers: int
    heads: int
    dim: int
    dtype: DType
    tokens: int

    def __post_init__(self) -> None:
        assert min(self.layers, self.heads, self.dim, self.tokens) >= 1, self

    @staticmethod
    def of(spec: MemorySpec, tokens: int) -> PartLayout:
        """The layout of a part of `tokens` tokens in a memory of this spec."""
        return PartLayout(len(spec.layers), spec.kv_heads, spec.head_dim, spec.dtype, tokens)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's key (or value) of one head."""
        return self.dim * self.dtype.itemsize

    @property
    def plane_nbytes(self) -> int:
        """Bytes of all keys (or all values)."""
        return self.layers * self.heads * self.tokens * self.row_nbytes

    @property
    def nbytes(self) -> int:
        return 2 * self.plane_nbytes + 4 * self.tokens

    @property
    def chunks(self) -> int:
        return -(-self.nbytes // CHUNK_BYTES)

    def chunk_nbytes(self, chunk: int) -> int:
        """Length of a chunk: CHUNK_BYTES, but for the last."""
        return min(CHUNK_BYTES, self.nbytes - chunk * CHUNK_BYTES)

    def extent(self, which: Which, layer: int, head: int, first: int, count: int) -> Extent:
        """The keys (or values) of `count` tokens of one layer (its place in the spec) and head."""
        assert 0 <= layer < self.layers and 0 <= head < self.heads and 0 <= first <= first + count <= self.tokens
        row = (layer * self.heads + head) * self.tokens + first
        return Extent((which == "values") * self.plane_nbytes + row * self.row_nbytes, count * self.row_nbytes)

    def ids_extent(self, first: int, count: int) -> Extent:
        """The token ids of `count` tokens."""
        assert 0 <= first <= first + count <= self.tokens
        return Extent(2 * self.plane_nbytes + 4 * first, 4 * count)


def part_tokens(spec: MemorySpec) -> int:
    """Tokens of every part of a document but its last; at least 1, else as many as fit PART_BYTES."""
    return max(1, PART_BYTES // (spec.bytes_per_token + 4))


def part_ranges(spec: MemorySpec, tokens: int) -> list[tuple[int, int]]:
    """(first token, tokens) of each part of a document of `tokens` tokens."""
    step = part_tokens(spec)
    return [(first, min(step, tokens - first)) for first in range(0, tokens, step)]


@dataclass(frozen=True, slots=True)
class PartHeader:
    """Which tokens of which document a part holds: everything the catalogue knows, so that it can be rebuilt."""

    document: str
    generation: int
    part: int
    parts: int
    first_token: int
    tokens: int
    document_tokens: int
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    committed_at: float = 0.0
    request_id: str = ""
    crcs: tuple[int, ...] = ()  # CRC-32 of each chunk of the payload.


@dataclass(frozen=True, slots=True)
class PartRef:
    """A part in a segment file."""

    offset: int  # Of the payload, from the start of the file.
    layout: PartLayout
    header: PartHeader

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """An immutable segment file and what it holds."""

    path: str  # File name in the memory's directory.
    nbytes: int
    header_bytes: int
    header_crc: int
    parts: tuple[PartRef, ...]


def encode_header(
    path: str, spec: MemorySpec, headers: Sequence[PartHeader], room: int = 0
) -> tuple[bytes, SegmentRef]:
    """The first bytes of a segment file and the file's description; padded to `room` bytes, or to the next 4 KiB.

    Raises InvalidArgument if `room` is given and too small, or if a text is not valid Unicode.
    """
    assert headers, "a segment holds at least one part"
    layouts = [PartLayout.of(spec, header.tokens) for header in headers]
    assert all(len(header.crcs) == layout.chunks for header, layout in zip(headers, layouts, strict=True))
    spec_json, parts_json = spec_to_json(spec), _json([_part_to_json(header) for header in headers])
    tensors: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "spec": spec_json,
            "parts": parts_json,
            "crc32": _metadata_crc(spec_json, parts_json),
        }
    }
    starts, end = [], 0
    for number, layout in enumerate(layouts):
        starts.append(end)
        shape = [layout.layers, layout.heads, layout.tokens, layout.dim]
        for name, dtype, size, dims in (
            ("keys", _SAFETENSORS_DTYPE[layout.dtype], layout.plane_nbytes, shape),
            ("values", _SAFETENSORS_DTYPE[layout.dtype], layout.plane_nbytes, shape),
            ("token_ids", "U32", 4 * layout.tokens, [layout.tokens]),
        ):
            tensors[f"p{number}.{name}"] = {"dtype": dtype, "shape": dims, "data_offsets": [end, end + size]}
            end += size
    text = _encoded(_json(tensors))
    size = room or -(-(8 + len(text)) // HEADER_STEP) * HEADER_STEP
    if 8 + len(text) > size:
        raise InvalidArgument(
            f"document id and metadata need {len(text)} bytes of header, there is room for {size - 8}"
        )
    block = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
    parts = tuple(map(PartRef, (size + start for start in starts), layouts, headers))
    return block, SegmentRef(path, size + end, size, crc32(block), parts)


def decode_header(path: str, block: bytes) -> tuple[MemorySpec, SegmentRef]:
    """Read a segment file's first bytes back; DataLoss unless they are exactly what `encode_header` wrote."""
    try:
        metadata = json.loads(block[8:])["__metadata__"]
        spec_json, parts_json = metadata["spec"], metadata["parts"]
        if metadata["crc32"] != _metadata_crc(spec_json, parts_json):
            raise DataLoss(f"{path}: the header does not match its checksum")
        spec = spec_from_json(spec_json)
        headers = [_part_from_json(one) for one in json.loads(parts_json)]
        again, ref = encode_header(path, spec, headers, room=len(block))
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError, InvalidArgument) as error:
        raise DataLoss(f"{path}: the header is damaged: {type(error).__name__}") from error
    if again != block:
        raise DataLoss(f"{path}: the header is damaged")
    return spec, ref


def spec_to_json(spec: MemorySpec) -> str:
    """Canonical JSON of a spec: equal specs give equal text."""
    one = spec.fingerprint
    return _json(
        {
            "fingerprint": {"model": one.model, "revision": one.revision, "weights": one.weights, "rope": one.rope},
            "layers": list(spec.layers),
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "dtype": spec.dtype.value,
            "index": {"factory": spec.index.factory, "min_tokens": spec.index.min_tokens},
        }
    )


def spec_from_json(text: str) -> MemorySpec:
    """Read a spec back; ValueError, KeyError or TypeError if it is none."""
    data = json.loads(text)
    return MemorySpec(
        fingerprint=Fingerprint(**data["fingerprint"]),
        layers=tuple(data["layers"]),
        kv_heads=data["kv_heads"],
        head_dim=data["head_dim"],
        dtype=DType(data["dtype"]),
        index=IndexPolicy(**data["index"]),
    )


def pack_crcs(crcs: Sequence[int]) -> bytes:
    """Checksums as little-endian uint32."""
    return b"".join(crc.to_bytes(4, "little") for crc in crcs)


def unpack_crcs(data: bytes) -> tuple[int, ...]:
    """Read `pack_crcs` back."""
    return tuple(int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4))


def _part_to_json(header: PartHeader) -> dict[str, Any]:
    plain = {name: getattr(header, name) for name in PartHeader.__slots__ if name not in ("metadata", "crcs")}
    return plain | {"metadata": dict(header.metadata), "crcs": pack_crcs(header.crcs).hex()}


def _part_from_json(data: dict[str, Any]) -> PartHeader:
    return replace(PartHeader(**data), crcs=unpack_crcs(bytes.fromhex(data["crcs"])))


def _metadata_crc(spec_json: str, parts_json: str) -> str:
    return f"{crc32(_encoded(FORMAT + spec_json + parts_json)):08x}"


def _json(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument("document ids and metadata must be valid Unicode") from error
