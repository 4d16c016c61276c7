"""What is known of every step: a row of metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

NAME = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """One step. Losses in nats a token; what a batch has none of is None."""

    step: int  # From 1.
    level: int  # Of the curriculum, from 0.
    loss: float  # What is minimised.
    answer_loss: float | None
    answer_accuracy: float | None
    text_loss: float | None
    lr: float  # The factor of all learning rates.
    gradient_norm: float  # Before clipping.
    temperature: float
    earlier: bool  # Whether the batch belongs to an earlier level, to keep what was learnt.
    tokens: int  # Since the training began.
    seconds: float  # Likewise; time between runs does not count.
    tokens_per_s: float  # In this step.


class Rows:
    """metrics.jsonl, one line a step."""

    def __init__(self, folder: Path, done: int = 0):
        """Go on after `done` steps: what was written of later ones will be done again."""
        path, aside = folder / NAME, folder / f"{NAME}.partial"
        kept = [row for row in read(folder) if row.step <= done]
        aside.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Write a row; others may read it at once."""
        self._file.write(_line(row))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(folder: Path) -> list[Row]:
    """The rows in a folder's metrics.jsonl; none if there is no such file. A last line that was cut off is left out."""
    return list(_rows(folder / NAME))


def _rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        return
    names = {one.name for one in fields(Row)}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            told = json.loads(line)
        except json.JSONDecodeError:
            return
        yield Row(**{name: told[name] for name in names})


def _line(row: Row) -> str:
    return json.dumps(asdict(row)) + "\n"
