"""Measured processes taking turns, and rows and figures of what they measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memory_service.bench.harness import row
from model_worker.bench.subject import Measured

Runs = dict[str, list[Measured]]


def take_turns(calls: Mapping[str, Callable[[], Measured]], rounds: Mapping[str, int]) -> Runs:
    """Each contender's rounds, interleaved, every other turn backwards. Who has fewer rounds takes the middle ones.

    The processes are warm already, so nothing is thrown away: the slowest contenders take minutes a round.
    """
    most = max(rounds.values())
    runs: Runs = {name: [] for name in calls}
    names = list(calls)
    for number in range(most):
        for name in names if number % 2 == 0 else reversed(names):
            skipped = (most - rounds[name]) // 2
            if skipped <= number < skipped + rounds[name]:
                runs[name].append(calls[name]())
    return runs


def seconds(runs: list[Measured]) -> list[float]:
    """Seconds of every token of every round."""
    return [one for run in runs for one in run.seconds]


def measured_row(name: str, runs: list[Measured], **facts: Any) -> dict[str, Any]:
    """A raw row of one contender: times, processor time a second, memory."""
    wall = sum(seconds(runs))
    return row(
        name,
        seconds(runs),
        **facts,
        cores_used=round(sum(run.cpu_s for run in runs) / wall, 2),
        rss_ready_mb=runs[0].rss_ready_mb,
        peak_rss_mb=max(run.peak_rss_mb for run in runs),
        growth_mb=round(max(run.growth_mb for run in runs), 1),
    )


def distance(one: Measured, other: Measured) -> float:
    """Largest difference of the logits after the last token."""
    return max(abs(a - b) for a, b in zip(one.logits, other.logits, strict=True))


def label(tokens: int) -> str:
    """4k, 64k, 1m."""
    if tokens % (1 << 20) == 0:
        return f"{tokens >> 20}m"
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else str(tokens)
