"""A supervisor is told that a server is ready, that it lives, and that it stops."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_service.process.lifetime import run, until_signal
from memory_service.process.notify import READY, Supervisor


@pytest.fixture
def line(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.settimeout(10)
        yield listening


class Idle:
    """A server that serves nothing."""

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


def test_a_server_tells_that_it_is_ready_that_it_lives_and_that_it_stops(
    line: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", line.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    heard: list[str] = []

    def stop_soon(_: Idle) -> None:
        import threading

        def listen() -> None:
            while heard.count("WATCHDOG=1") < 3:
                heard.append(line.recv(99).decode())
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=listen).start()

    run(until_signal(Idle, stop_soon))
    while heard[-1] != "STOPPING=1":
        heard.append(line.recv(99).decode())
    assert heard[0] == "READY=1"
    assert set(heard) == {"READY=1", "WATCHDOG=1", "STOPPING=1"}


def test_by_name_too(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0fot-test-{os.getpid()}")
        listening.settimeout(10)
        Supervisor(f"@fot-test-{os.getpid()}").tell(READY)
        assert listening.recv(99) == b"READY=1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "1000"},
        {"NOTIFY_SOCKET": "relative", "WATCHDOG_USEC": "1000"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
    ],
)
def test_who_does_not_watch_this_process_is_not_told_that_it_lives(environment: dict[str, str]) -> None:
    supervisor = Supervisor.of(environment)
    assert supervisor.every_s is None
    supervisor.tell(READY)  # Nobody listens; nothing happens.
