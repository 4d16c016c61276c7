"""The main program of a measured process: builds one contender, then obeys commands from standard input."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from memory_service.bench.harness import single_threaded
from memory_service.errors import FotError, InvalidArgument
from model_worker.bench.contender import Contender, Fot, make
from model_worker.bench.geometry import Geometry
from model_worker.bench.subject import Measured, Mode, Setup

MIB = 1 << 20


class Bench:
    """The contender and the commands it obeys."""

    def __init__(self, confined: bool = False):
        """`confined`: to as many cores as the contender has threads, for good; for a process of its own."""
        self._setup = Setup("", Geometry())
        self._contender: Contender | None = None
        self._confined = confined
        self._alone = ExitStack()
        self._ready_mb = 0.0
        self._commands: dict[str, Callable[[dict[str, Any]], Any]] = {
            "setup": self.setup,
            "prefill": self.prefill,
            "start": self.start,
            "decode": self.decode,
            "quality": self.quality,
        }

    def obey(self, line: str) -> str:
        """Do what a line of JSON says; the answer, or the error, as another."""
        facts = json.loads(line)
        try:
            return json.dumps({"answer": self._commands[facts.pop("command")](facts)})
        except FotError as error:
            return json.dumps({"error": error.message})

    def setup(self, facts: dict[str, Any]) -> None:
        """Build the contender."""
        extend = facts.pop("extend")
        self._setup = Setup(
            geometry=Geometry(**facts.pop("geometry")),
            layers=tuple(facts.pop("layers")),
            extend=tuple(extend) if extend else None,
            **facts,
        )
        self._contender = make(self._setup)
        self._ready_mb = _mb(psutil.Process().memory_info().rss)
        if self._confined:
            # Only now: planting and indexing may use the whole machine.
            self._alone.enter_context(_confined(self._setup.threads))

    def prefill(self, facts: dict[str, Any]) -> dict[str, Any]:
        ids = self._setup.geometry.tokens(facts["tokens"])
        return self._measure(lambda _: self._ready.prefill(ids), [ids])

    def start(self, facts: dict[str, Any]) -> None:
        self._ready.start(self._setup.geometry.tokens(facts["tokens"]), Mode(**facts["mode"]))

    def decode(self, facts: dict[str, Any]) -> dict[str, Any]:
        mode = Mode(**facts["mode"])
        tokens = self._setup.geometry.tokens(facts["tokens"]).unbind(1)
        return self._measure(lambda token: self._ready.decode(token[None], mode), tokens)

    def quality(self, facts: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(self._ready, Fot):
            raise InvalidArgument("only our model has an index")
        return asdict(self._ready.quality(self._setup.geometry.tokens(facts["tokens"]), Mode(**facts["mode"])))

    def _measure(self, call: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> dict[str, Any]:
        """Time a call on each input; what they answer is the last one's logits."""
        _forget_peak()
        seconds = []
        cpu = time.process_time()
        with torch.inference_mode():
            for one in inputs:
                started = time.perf_counter()
                logits = call(one)
                seconds.append(time.perf_counter() - started)
        cpu = time.process_time() - cpu
        # The peak is told against the fresh process: what earlier runs freed is often not given back yet.
        return asdict(Measured(seconds, round(cpu, 4), self._ready_mb, _mb(_peak()), logits.tolist()))

    @property
    def _ready(self) -> Contender:
        if self._contender is None:
            raise InvalidArgument("the first command is setup")
        return self._contender

    def close(self) -> None:
        """Let go of the contender."""
        if self._contender is not None:
            self._contender.close()
        self._alone.close()


@contextmanager
def _confined(threads: int) -> Iterator[None]:
    """So many threads on so many cores: the work of a helper thread on another core would not be seen otherwise."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    with single_threaded() if threads == 1 else nullcontext():
        torch.set_num_threads(threads)
        yield


def _forget_peak() -> None:
    """Let the system count this process's peak memory anew; Linux only, elsewhere the peak is the process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """Peak resident memory, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _mb(count: int) -> float:
    return round(count / MIB, 1)


def main() -> None:
    """Obey until standard input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench = Bench(confined=True)
    for line in sys.stdin:
        print(bench.obey(line), file=answers, flush=True)
    bench.close()


if __name__ == "__main__":
    main()
