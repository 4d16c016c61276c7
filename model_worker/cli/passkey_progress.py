"""How far `fot passkey` is, on standard error: two moving lines where somebody watches, else a line a trial."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from model_worker.evaluation.trials import Outcome, Trial

LINE_S = 10.0  # Between two lines within a trial; more as it takes long.


class PasskeyProgress:
    """Shows the trial, its depth, what was found so far with its interval, tokens/s and the time left."""

    def __init__(self, trials: int, tokens: int):
        """`tokens` of all trials together."""
        from model_worker.evaluation.wilson import Share

        self._trials, self._tokens = trials, tokens
        self._share = Share(0, 0)
        self._done = 0  # Tokens of trials that ended.
        self._filled = 0  # Of the trials under way.
        self._trial: Trial | None = None  # That begun last, or has ended.
        self._under_way: dict[int, int] = {}  # Tokens of trials, by their numbers; on a cluster of several.
        self._speed = 0.0
        self._begun = self._said = self._began = time.monotonic()
        self._screen = _Screen(tokens) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._screen is not None:
            self._screen.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._screen is not None:
            self._screen.live.stop()

    # --- What the job tells ---

    def begins(self, trial: Trial, tokens: int) -> None:
        self._trial = trial
        if not self._under_way:
            self._filled, self._began = 0, time.monotonic()
        self._under_way[trial.number] = tokens
        self._show()

    def fills(self, tokens: int) -> None:
        self._filled += tokens
        now = time.monotonic()
        self._speed = self._filled / (now - self._began) if now > self._began else 0.0
        if self._screen is None and now - self._said >= max(LINE_S, (now - self._began) / 5):
            self._write(f"{self._filled:,} in memory, {self._speed:,.0f} tokens/s, {self._left(now)}")
        self._show()

    def ends(self, outcome: Outcome) -> None:
        from model_worker.evaluation.wilson import Share

        self._share += Share(int(outcome.found), 1)
        self._trial = outcome.trial
        tokens = self._under_way.pop(outcome.trial.number, 0)
        self._done += tokens
        self._filled = max(0, self._filled - tokens) if self._under_way else 0
        asked = outcome.asked
        self._speed = asked.tokens / asked.prefill_s if asked.prefill_s else 0.0
        result = f"found {outcome.key}" if outcome.found else f"said {outcome.said!r}, not {outcome.key}"
        if self._screen is None:
            self._write(f"{result}; {self._found()}, {self._speed:,.0f} tokens/s, {self._left(time.monotonic())}")
        elif not outcome.found:
            self._screen.console.print(Text(f"{self._place()}: {result}"))
        self._show()

    # --- How it is shown ---

    def _show(self) -> None:
        if self._screen is not None:
            words = f"{self._place()} · {self._found()} · {self._speed:,.0f} tokens/s"
            self._screen.show(words, self._done + min(self._filled, sum(self._under_way.values())))

    def _write(self, words: str) -> None:
        self._said = time.monotonic()
        sys.stderr.write(f"{self._place()}: {words}\n")
        sys.stderr.flush()

    def _place(self) -> str:
        trial = self._trial
        if trial is None:
            return "no trial"
        return f"trial {trial.number + 1}/{self._trials}, {trial.tokens:,} tokens, depth {trial.depth:.0%}"

    def _found(self) -> str:
        share = self._share
        return f"{share.found} of {share.trials} found, {share}" if share.trials else "none asked yet"

    def _left(self, now: float) -> str:
        done = self._done + self._filled
        if not done or done >= self._tokens:
            return f"{now - self._begun:,.0f} s in all"
        left_s = (now - self._begun) * (self._tokens - done) / done
        return f"{left_s / 60:,.0f} min left" if left_s >= 90 else f"{left_s:,.0f} s left"


class _Screen:
    """A line of words and a bar below it."""

    def __init__(self, tokens: int):
        self.console = Console(stderr=True, highlight=False)
        columns = (BarColumn(bar_width=40), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("· left"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
        self._task = self._bar.add_task("", total=tokens)
        self._words = Text("making the first prompt", style="dim", no_wrap=True, overflow="ellipsis")
        self.live = Live(Group(self._words, self._bar), console=self.console, transient=True, refresh_per_second=5)

    def show(self, words: str, completed: int) -> None:
        self._words.plain = words
        self._bar.update(self._task, completed=completed)
