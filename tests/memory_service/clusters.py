"""Clusters for tests: services in this process, or processes that can be killed, and one memory to compare with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from memory_service import DType, Fingerprint, MemorySpec
from memory_service.server.server import running
from memory_service.settings import ServerSettings, StoreOptions
from memory_service.store.store import Store
from tests.memory_service.places import QUIET
from tests.ports import own_port

SPEC = MemorySpec(Fingerprint("tiny"), (1, 3), 2, 8, DType.F32)
LAYER = 3


@contextmanager
def services(count: int, directory: Path | None = None, **settings: object) -> Iterator[list[str]]:
    """The addresses of services in this process, over RAM or over directories of their own."""
    with ExitStack() as closing:
        addresses = []
        for number in range(count):
            given = {"listen": "127.0.0.1:0", "drain_grace_s": 0.2, "attend_threads": 1} | settings
            place = None if directory is None else directory / f"service-{number}"
            store = closing.enter_context(Store.open(place, QUIET))
            addresses.append(closing.enter_context(running(store, ServerSettings(**given))))  # type: ignore[arg-type]
        yield addresses


class Service:
    """A service in this process over a directory, at a port that stays its own; stopped, it answers nothing more."""

    def __init__(self, directory: Path, options: StoreOptions = QUIET, **settings: object):
        self.address = f"127.0.0.1:{own_port()}"
        self.directory = directory
        self.options = options
        self._settings = settings
        self._closing: ExitStack | None = None

    @property
    def alive(self) -> bool:
        return self._closing is not None

    def start(self) -> None:
        given = {"listen": self.address, "drain_grace_s": 0.0, "attend_threads": 1} | self._settings
        with ExitStack() as closing:
            store = closing.enter_context(Store.open(self.directory, self.options))
            closing.enter_context(running(store, ServerSettings(**given)))  # type: ignore[arg-type]
            self._closing = closing.pop_all()

    def stop(self) -> None:
        assert self._closing is not None
        self._closing.close()
        self._closing = None


@contextmanager
def restartable(
    directory: Path, count: int, options: StoreOptions = QUIET, **settings: object
) -> Iterator[list[Service]]:
    """Started services that a test stops and starts again."""
    found = [Service(directory / f"service-{number}", options, **settings) for number in range(count)]
    try:
        for one in found:
            one.start()
        yield found
    finally:
        for one in found:
            if one.alive:
                one.stop()


def target(addresses: Sequence[str], query: str = "") -> str:
    """A cluster's target, also where it is one service."""
    return f"grpc://{','.join(addresses)}?{query or 'replicas=1'}"


def drawn(seed: int, tokens: int, spec: MemorySpec = SPEC) -> tuple[Tensor, Tensor]:
    """Keys and values [L, H, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, len(spec.layers), spec.kv_heads, tokens, spec.head_dim, generator=generator)
    return both[0], both[1]


class Process:
    """`fot serve` in a process of its own, at a port that stays its own."""

    def __init__(self, directory: Path, port: int | None = None):
        self.directory = directory
        self.port = port or own_port()
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[str] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start it; `wait` until it serves."""
        command = [sys.executable, "-m", "memory_service.cli", "serve", str(self.directory), "--listen", self.address]
        environment = os.environ | {"FOT_DRAIN_GRACE_S": "0.2", "FOT_ATTEND_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def wait(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert "serves" in self._process.stdout.readline()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None


@contextmanager
def processes(directory: Path, count: int) -> Iterator[list[Process]]:
    """Services that can be killed; all are dead afterwards."""
    started = [Process(directory / f"process-{number}") for number in range(count)]
    try:
        for one in started:
            one.start()
        for one in started:
            one.wait()
        yield started
    finally:
        for one in started:
            if one.alive:
                one.kill()


def until(condition: object, timeout_s: float = 30.0) -> None:
    """Wait until a function says yes."""
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
