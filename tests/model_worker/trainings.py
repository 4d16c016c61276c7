"""Trainings small enough for tests: a Llama of three layers on the dictionary task, or on a source of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model_worker.training import config as configuration
from model_worker.training.config import TrainConfig
from model_worker.training.shapes import Batch, Shape

MODEL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 36,
    "tie_word_embeddings": True,
    "vocab_size": 64,
}
SMALL: dict[str, Any] = {"documents": 2, "group": 2, "window": 36}


def tables(**changes: Any) -> dict[str, Any]:
    """A configuration as TOML gives it; two levels, so that there is a curriculum to resume."""
    told: dict[str, Any] = {
        "steps": 10,
        "out": "unused",
        "model": dict(MODEL),
        "fot": {"mem_layers": [1], "window": 36},
        "optimizer": {"warmup": 3},
        "data": {"source": "dictionary"},
        "level": [
            {"max_steps": 4, "shapes": [SMALL]},
            {"earlier": 0.4, "temperatures": [1.0, 0.5], "lr": 0.5, "shapes": [SMALL, {**SMALL, "hard": 0.5}]},
        ],
    }
    return {**told, **changes}


def small(out: Path, **changes: Any) -> TrainConfig:
    """A configuration that trains for seconds and writes to `out`."""
    return configuration.of_tables(tables(out=str(out), **changes), out.parent)


class Echo:
    """Every token is followed by the next number: what can be learnt in a few steps, without memory."""

    def batch(self, step: int, shape: Shape) -> Batch:
        """Rows that count from a random start."""
        generator = torch.Generator().manual_seed(step)
        rows = shape.documents * shape.windows
        start = torch.randint(16, (rows, 1), generator=generator)
        counted = (start + torch.arange(shape.window + 1)) % 16
        return Batch(
            ids=counted[:, :-1],
            targets=counted[:, 1:],
            weights=torch.rand(rows, shape.window, generator=generator) + 0.5,
            answers=torch.ones(rows, shape.window, dtype=torch.bool),
            reads=((),) * rows,
        )
