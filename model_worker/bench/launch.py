"""Starts the process a contender is measured in."""

from __future__ import annotations

import os
import subprocess
import sys

from memory_service.errors import Unavailable
from model_worker.bench.subject import Channel, Setup, Subject


def launch(setup: Setup, *, here: bool = False) -> Subject:
    """A contender, ready: its model built, its memory planted.

    `here`: in this process, unconfined, for runs whose figures mean nothing. Raises Unavailable if it fails.
    """
    return Subject(setup, _bench() if here else Pipe())


class Pipe:
    """The process, through its standard input and output; what it says on standard error is everybody's to see."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "model_worker.bench.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
            text=True,
        )

    def obey(self, line: str) -> str:
        """Send a command and wait for its answer. Raises Unavailable if the process ends instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(line + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Unavailable(f"a process that was measured ended with code {self._process.wait()}")
        return answer

    def close(self) -> None:
        """Its input ends, and so does it. Harmless twice."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _bench() -> Channel:
    # Imported when needed: a parent of processes does without transformers.
    from model_worker.bench.process import Bench

    return Bench()
