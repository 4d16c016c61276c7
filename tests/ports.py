"""Ports for services that stop and start again: nothing else takes one meanwhile."""

from __future__ import annotations

import secrets
import socket

# Below what systems give to outgoing connections (from 32768), and above what Ray gives to its workers (to 19999).
_RANGE = range(20_000, 32_768)
_ours: list[socket.socket] = []


def own_port() -> int:
    """A free TCP port of 127.0.0.1 that stays this process's as long as it lives.

    A port that a system chooses is one of those it gives to outgoing connections: as soon as its service stops, any
    connection of any process may get it. These are never chosen, and tests tell each other by the UDP port of the
    same number which ones they have.
    """
    for port in secrets.SystemRandom().sample(_RANGE, len(_RANGE)):
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))
            with socket.create_server(("127.0.0.1", port)):
                pass
        except OSError:
            claim.close()
            continue
        _ours.append(claim)
        return port
    raise AssertionError("no port is free")
