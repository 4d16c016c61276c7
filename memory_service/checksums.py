"""CRC-32, the checksum of every stored and sent byte: zlib's value, computed at the speed of memory."""

from __future__ import annotations

from zlib_ng.zlib_ng import crc32

__all__ = ["crc32"]
