"""How far a study is, on standard error: a bar where somebody watches, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

LINE_S = 5.0  # Between two lines.


class StudyProgress:
    """Called with the steps done, the steps in all, and what is done now."""

    def __init__(self, study: str):
        self._study = study
        self._begun = time.monotonic()
        self._said = -LINE_S
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            )  # fmt: skip
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(study, total=None)

    def __call__(self, done: int, total: int, words: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=f"{self._study}: {words}")
            return
        now = time.monotonic()
        if now - self._said >= LINE_S:
            self._said = now
            # Steps of a study differ too much to say from some how long the others take.
            past = now - self._begun
            told = f"{past / 60:,.0f} min" if past >= 90 else f"{past:,.0f} s"
            sys.stderr.write(f"{self._study} {done}/{total}: {words}, {told} so far\n")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
