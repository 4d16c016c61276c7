"""How far an ingest is, on standard error: a bar where somebody watches, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from model_worker.cli.console import counted

if TYPE_CHECKING:
    from model_worker.ingestion.intake import IngestReport

LINE_S = 10.0  # Between two lines.


class Progress:
    """Shows documents, tokens, tokens/s and, if `total_bytes` of the corpus are known, the time left."""

    def __init__(self, total_bytes: int | None):
        from model_worker.ingestion.intake import IngestReport

        self.report: IngestReport = IngestReport()
        self.begun = False  # Whether the ingest has said anything.
        self._total = total_bytes
        self._tokens = 0  # Encoded, of which some are still on their way into the memory.
        self._begun = self._said = time.monotonic()
        self._first: tuple[float, int] | None = None  # When encoding began, and how much had been read by then.
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total_bytes)
            self._bar.start()

    def encoded(self, tokens: int) -> None:
        """So many more tokens have keys and values."""
        if self._first is None:
            self._first = (time.monotonic(), self.report.bytes_read)
        self._tokens += tokens
        self._show()

    def reached(self, report: IngestReport) -> None:
        """The ingest is so far."""
        self.report, self.begun = report, True
        self._show()

    def close(self) -> None:
        """Take the bar away. Harmless twice."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.report.bytes_read, description=self._words())
        elif (now := time.monotonic()) - self._said >= LINE_S:
            self._said = now
            sys.stderr.write(f"{self._words()}{self._left(now)}\n")

    def _words(self) -> str:
        elapsed = time.monotonic() - (self._first[0] if self._first else self._begun)
        done = self.report.stored + self.report.unchanged
        speed = self._tokens / elapsed if elapsed and self._tokens else 0.0
        return f"{counted(done, 'document')}, {self._tokens:,} tokens, {speed:,.0f} tokens/s"

    def _left(self, now: float) -> str:
        """Share of the corpus and the time left, judged by what was encoded: skipping takes no time."""
        if not self._total:
            return ""
        read = self.report.bytes_read
        said = f", {min(1.0, read / self._total):.0%}"
        if self._first is None or read <= self._first[1]:
            return said
        left_s = (now - self._first[0]) * max(0, self._total - read) / (read - self._first[1])
        return f"{said}, {left_s / 60:,.0f} min left" if left_s >= 90 else f"{said}, {left_s:,.0f} s left"
