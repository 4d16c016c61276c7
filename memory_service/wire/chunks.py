"""Chunks of a document as messages of an upload stream, framed by hand: protobuf would copy each megabyte twice."""

from __future__ import annotations

from typing import NamedTuple

from memory_service.types.uploads import Chunk
from memory_service.v1 import memory_pb2 as pb
from memory_service.wire.messages import parse


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
