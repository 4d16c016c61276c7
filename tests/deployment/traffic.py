"""Clusters on the tests' Ray, who reads and writes them meanwhile, and one memory to compare with."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from memory_service import Coverage, Memory
from model_worker.deployment import memory_cluster
from model_worker.deployment.plan import ClusterState, Plan, Report
from tests.memory_service.clusters import LAYER, SPEC, drawn

ALL_S = 120.0
_PAUSE_S = 0.05  # Between calls: what starts meanwhile needs the cores too.
_SETTINGS = (("FOT_ATTEND_THREADS", "1"), ("FOT_DRAIN_GRACE_S", "0.2"), ("OMP_NUM_THREADS", "1"))


def plan(name: str, data: Path, shards: int, replicas: int, **given: Any) -> Plan:
    """Of a cluster in which each node has a disk of its own, and one that is gone is soon replaced."""
    usual = {"settings": _SETTINGS, "replace_after_s": 0.5, "heal_every_s": 5.0}
    return Plan(name, shards, replicas, f"{data}/{{node}}", **(usual | given))


@contextmanager
def running(wanted: Plan) -> Iterator[ClusterState]:
    """A cluster that is up, and afterwards down with nothing left on any disk that is there."""
    try:
        memory_cluster.bring_up(wanted)
        yield until_ready(wanted.name)
    finally:
        pids = [report.pid for report in reports(wanted.name) if report.pid]
        memory_cluster.take_down(wanted.name, delete_data=True)
        assert not [pid for pid in pids if psutil.pid_exists(pid)]


def until_ready(name: str) -> ClusterState:
    """Wait until a cluster is as wanted."""
    *_, last = memory_cluster.watch(name, ALL_S)
    return last


def until(condition: Callable[[], bool], timeout_s: float = ALL_S) -> None:
    """Wait until a function says yes."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def reports(name: str) -> list[Report]:
    """What the keepers of a cluster say."""
    return [one.report for one in memory_cluster.state_of(name).copies if one.report is not None]


def kill(report: Report) -> None:
    """kill -9 of a service."""
    os.kill(report.pid, signal.SIGKILL)


def opened(name: str, query: str = "", **given: Any) -> Memory:
    """The cluster's memory "m"."""
    return Memory.open(f"ray://{name}{query}", "m", SPEC, **given)


def queries(seed: int = 7) -> Tensor:
    """[heads, queries, head_dim]"""
    return torch.randn(4, 3, SPEC.head_dim, generator=torch.Generator().manual_seed(seed))


def put(memory: Memory, names: Sequence[str]) -> None:
    """Documents whose contents follow from their names."""
    for name in names:
        memory.put(name, *_content(name))


def same_as_one(memory: Memory, names: Sequence[str], **asked: Any) -> None:
    """The memory holds these documents, no more and no less, and answers as one memory would."""
    with Memory.open(":memory:", "m", SPEC) as one:
        put(one, names)
        for top_k in (0, 5):
            wanted, found = (each.attend(LAYER, queries(), top_k=top_k, **asked) for each in (one, memory))
            assert found.coverage == wanted.coverage
            torch.testing.assert_close(found.partial.output, wanted.partial.output, atol=1e-5, rtol=0)
            torch.testing.assert_close(found.partial.lse, wanted.partial.lse, atol=1e-5, rtol=0)
        if not asked:
            assert sorted(info.id for info in memory.documents()) == sorted(names)


def tokens(names: Sequence[str]) -> int:
    """How many the documents have together."""
    return sum(_content(name)[0].shape[2] for name in names)


def _content(name: str) -> tuple[Tensor, Tensor]:
    seed = sum(name.encode())
    return drawn(seed, 2 + seed % 5)


@dataclass(slots=True)
class Traffic:
    """What readers and writers met."""

    written: list[str] = field(default_factory=list)  # Acknowledged, in order.
    answers: int = 0
    failures: list[str] = field(default_factory=list)

    def more(self, answers: int = 10, written: int = 5) -> None:
        """Wait until so many more calls were answered."""
        goal = (self.answers + answers, len(self.written) + written)
        until(lambda: (self.answers >= goal[0] and len(self.written) >= goal[1]) or bool(self.failures))
        assert not self.failures, self.failures[0]


@contextmanager
def traffic(name: str, there: Sequence[str], writes: bool = True) -> Iterator[Traffic]:
    """Somebody attends to the documents that are there and compares, somebody writes others, until the end."""
    met = Traffic()
    ending = threading.Event()
    with Memory.open(":memory:", "m", SPEC) as one:
        put(one, there)
        wanted = one.attend(LAYER, queries()).partial.output

    def read() -> None:
        with opened(name) as memory:
            while not ending.is_set():
                answer = memory.attend(LAYER, queries(), scope=list(there))
                assert answer.coverage == Coverage(tokens(there), tokens(there)), answer.coverage
                torch.testing.assert_close(answer.partial.output, wanted, atol=1e-5, rtol=0)
                met.answers += 1
                ending.wait(_PAUSE_S)

    def write() -> None:
        with opened(name) as memory:
            while not ending.is_set():
                document = f"written-{len(met.written)}"
                put(memory, [document])
                met.written.append(document)
                ending.wait(_PAUSE_S)

    def watched(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # Whatever it is, the test fails with it rather than the thread.
            met.failures.append("".join(traceback.format_exception(error)))

    works = [read, write] if writes else [read]
    threads = [threading.Thread(target=watched, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield met
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert not met.failures, met.failures[0]
