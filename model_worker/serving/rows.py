"""The answers that are being written: a row of the model's batch each, with its newest token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model_worker.decoder.model import FotModel
from model_worker.decoder.state import State
from model_worker.recall.line import Line
from model_worker.serving.job import Job


class Rows:
    """Not thread-safe. Who leaves gives its row to the last: go through rows backwards where some may leave."""

    def __init__(self, model: FotModel):
        self._model = model
        self.jobs: list[Job] = []
        self._newest: list[int] = []
        self._batch = model.start()

    def __len__(self) -> int:
        return len(self.jobs)

    def admit(self, state: State, jobs: Sequence[Job], newest: Sequence[int]) -> None:
        """Add the rows of a state, which is the batch's from now on."""
        self._batch.admit(state)
        self.jobs += jobs
        self._newest += newest

    def step(self) -> Tensor:
        """Read the newest token of every row; the logits [B, V] of the next, float32 on the CPU."""
        return self._model.step(self._batch, self._newest).float().cpu()

    def set_newest(self, row: int, token: int) -> None:
        """The token that the next step reads."""
        self._newest[row] = token

    @property
    def lines(self) -> Sequence[Line]:
        """What each row has of the memory, and what went wrong with it alone."""
        return self._batch.lines

    def alone(self, row: int) -> State:
        """A state of what the row has seen, of its own."""
        return self._batch.alone(row)

    def leave(self, row: int) -> Line:
        """Let a row go, and the last one take its place."""
        self.jobs[row], self._newest[row] = self.jobs[-1], self._newest[-1]
        self.jobs.pop()
        self._newest.pop()
        return self._batch.leave(row)

    def abandon(self) -> list[tuple[Job, Line]]:
        """Give all rows up and begin another batch: a step failed half way, so nobody knows what they saw."""
        lost = list(zip(self.jobs, self.lines, strict=True))
        self.jobs, self._newest = [], []
        self._batch = self._model.start()
        return lost
