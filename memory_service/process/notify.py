"""Telling whoever started this process how it is, by systemd's protocol: ready, still alive, stopping.

A supervisor that is told nothing for too long can end a process that hangs: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

READY = "READY=1"
ALIVE = "WATCHDOG=1"
STOPPING = "STOPPING=1"


class Supervisor:
    """Who wants to be told; without one, telling costs nothing."""

    def __init__(self, address: str = "", watchdog_s: float | None = None):
        """`address` is a Unix datagram socket's path, or "@name" of an abstract one."""
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.every_s = None if watchdog_s is None or not address else watchdog_s / 3
        """How often it wants to be told that this process lives; None: never."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """What NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID say; anything odd in them is no supervisor's."""
        address, own = environment.get("NOTIFY_SOCKET", ""), str(os.getpid())
        period = environment.get("WATCHDOG_USEC", "")
        watched = period.isdecimal() and int(period) > 0 and environment.get("WATCHDOG_PID", own) == own
        return cls(address if address[:1] in ("/", "@") else "", int(period) / 1e6 if watched else None)

    def tell(self, what: str) -> None:
        """Say it, without waiting; if nobody listens any more, nothing happens."""
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
            line.setblocking(False)
            line.sendto(what.encode(), self._address)
