"""Which batch a step trains on, and when it gets harder. What is drawn depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from model_worker.training.config import Level
from model_worker.training.shapes import Shape

_STREAM = 0xC0  # Keeps these draws apart from those of a source with the same seed.


class Draw(NamedTuple):
    """What a step trains on."""

    level: int  # Whose batch it is: the one reached, or an earlier one.
    shape: Shape
    temperature: float


class Curriculum:
    """Levels are left when their own batches are answered well; some batches stay with what was learnt before."""

    def __init__(self, levels: Sequence[Level], seed: int):
        self.level = 0
        self.passed: list[tuple[int, str]] = []  # The steps after which a level ended, and why.
        self._levels = tuple(levels)
        self._seed = seed
        self._steps = 0  # In this level.
        self._sum = 0.0  # Of accuracies, the newest counting most, and
        self._count = 0.0  # of their weights.

    @property
    def current(self) -> Level:
        return self._levels[self.level]

    @property
    def accuracy(self) -> float:
        """The exponential mean of the answer accuracy on this level's own batches; 0 before the first."""
        return self._sum / self._count if self._count else 0.0

    def draw(self, step: int) -> Draw:
        """What step `step` trains on."""
        generator = np.random.default_rng((_STREAM, self._seed, step))
        # Every number is drawn whether it is needed or not, so that none moves another.
        review, which, choice, warmth = generator.random(4)
        number = self.level
        if number and review < self.current.earlier:
            number = int(which * number)
        level = self._levels[number]
        weights = np.cumsum([shape.weight for shape in level.shapes])
        shape = level.shapes[int(np.searchsorted(weights, choice * weights[-1], side="right"))]
        return Draw(number, shape, level.temperatures[int(warmth * len(level.temperatures))])

    def answered(self, step: int, draw: Draw, accuracy: float | None) -> bool:
        """Step `step` is done, this share of its answers was right (None: it had none); True if a level was passed."""
        level = self.current
        self._steps += 1
        if draw.level == self.level and accuracy is not None:
            self._sum = level.smoothing * self._sum + (1 - level.smoothing) * accuracy
            self._count = level.smoothing * self._count + (1 - level.smoothing)
        if self.level + 1 == len(self._levels):
            return False
        learnt = level.until_accuracy is not None and self._steps >= level.min_steps
        if learnt and self.accuracy > (level.until_accuracy or 0.0):
            return self._up(step, f"{self.accuracy:.0%} of answers right")
        if level.max_steps is not None and self._steps >= level.max_steps:
            return self._up(step, f"{level.max_steps} steps are over, at {self.accuracy:.0%} of answers right")
        return False

    def _up(self, step: int, why: str) -> bool:
        self.passed.append((step, why))
        self.level += 1
        self._steps, self._sum, self._count = 0, 0.0, 0.0
        return True

    # --- between processes ---

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        return {
            "level": self.level,
            "steps": self._steps,
            "sum": self._sum,
            "count": self._count,
            "passed": [list(one) for one in self.passed],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state()` gave."""
        self.level, self._steps = int(state["level"]), int(state["steps"])
        self._sum, self._count = float(state["sum"]), float(state["count"])
        self.passed = [(int(step), str(why)) for step, why in state["passed"]]
