"""What is worth knowing of a training afterwards: training.json beside its model, which the card is written from."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from memory_service.errors import InvalidArgument
from model_worker.training.metrics import Row

NAME = "training.json"
_LAST = 50  # Steps that the final figures are the mean of.


@dataclass(frozen=True, slots=True)
class Record:
    """How a model was trained."""

    config: Mapping[str, Any]  # What `TrainConfig.described` gave.
    fot: Mapping[str, Any]
    architecture: str
    parameters: int
    trained_parameters: int
    steps: int
    tokens: int
    seconds: float  # Of steps; loading, saving and pauses left out.
    processes: int
    passed: Sequence[tuple[int, str]]  # The steps after which levels of the curriculum ended, and why.
    final: Mapping[str, float | None]  # Means of the last steps.
    machine: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write training.json."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Record:
    """The record beside a model. Raises InvalidArgument if there is none."""
    place = folder / NAME
    if not place.is_file():
        raise InvalidArgument(f"{place} does not exist: {folder} is no model that fot train made")
    told = json.loads(place.read_text(encoding="utf-8"))
    told["passed"] = [(step, why) for step, why in told["passed"]]
    return Record(**{one.name: told[one.name] for one in fields(Record)})


def final_figures(rows: Sequence[Row]) -> dict[str, float | None]:
    """Means over the last steps."""
    last = rows[-_LAST:]
    figures: dict[str, float | None] = {"steps": float(len(last))}
    for name in ("loss", "answer_loss", "answer_accuracy", "text_loss", "tokens_per_s"):
        values = [value for row in last if (value := getattr(row, name)) is not None]
        figures[name] = sum(values) / len(values) if values else None
    return figures


def machine() -> dict[str, Any]:
    """Where it ran, as far as that explains how long it took."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.processor() or platform.machine()
