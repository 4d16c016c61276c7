"""How the C library keeps freed memory. A service reads and drops megabytes all the time; by default every one of them
is mapped anew, and its fresh pages cost as much as the copy into them."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # Of glibc's malloc.h.


def keep_freed_memory(limit_bytes: int = 512 << 20) -> None:
    """Reuse buffers of up to 32 MiB instead of giving them back, up to `limit_bytes`. Does nothing without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # Another C library.
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, limit_bytes)
    mallopt(_M_TOP_PAD, 64 << 20)
