"""The model worker: gives Hugging Face decoders a memory of attention keys and values.

with FotModel.from_pretrained("path", memory="./corpus", mem_layers=(6, 12, 18)) as model:
    model.generate(**tokenizer("…", return_tensors="pt"), max_new_tokens=20)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model_worker.answering.answers import Answer, Answering, answer
    from model_worker.decoder.fitting import spec_of
    from model_worker.decoder.model import FotModel
    from model_worker.decoder.state import State
    from model_worker.errors import InputTooLong, UnsupportedModel
    from model_worker.ingestion.encoding import Encoded, Encoder
    from model_worker.ingestion.intake import IngestReport
    from model_worker.positions.cream import Cream, Pose, RandomPositions
    from model_worker.positions.scaling import Scaling, scaled_config
    from model_worker.recall.tally import Tally
    from model_worker.settings import (
        Cut,
        FotConfig,
        LogitScaling,
        MemoryPosition,
        Overflow,
        Read,
        Recall,
        SelfExtend,
    )
    from model_worker.training.collator import Collator

# Loaded when asked for: the commands that need no model start without transformers.
_HOMES = {
    "Answer": "answering.answers",
    "Answering": "answering.answers",
    "Collator": "training.collator",
    "Cream": "positions.cream",
    "Cut": "settings",
    "Encoded": "ingestion.encoding",
    "Encoder": "ingestion.encoding",
    "FotConfig": "settings",
    "FotModel": "decoder.model",
    "IngestReport": "ingestion.intake",
    "InputTooLong": "errors",
    "LogitScaling": "settings",
    "MemoryPosition": "settings",
    "Overflow": "settings",
    "Pose": "positions.cream",
    "RandomPositions": "positions.cream",
    "Read": "settings",
    "Recall": "settings",
    "Scaling": "positions.scaling",
    "SelfExtend": "settings",
    "State": "decoder.state",
    "Tally": "recall.tally",
    "UnsupportedModel": "errors",
    "answer": "answering.answers",
    "scaled_config": "positions.scaling",
    "spec_of": "decoder.fitting",
}

__all__ = [
    "Answer",
    "Answering",
    "Collator",
    "Cream",
    "Cut",
    "Encoded",
    "Encoder",
    "FotConfig",
    "FotModel",
    "IngestReport",
    "InputTooLong",
    "LogitScaling",
    "MemoryPosition",
    "Overflow",
    "Pose",
    "RandomPositions",
    "Read",
    "Recall",
    "Scaling",
    "SelfExtend",
    "State",
    "Tally",
    "UnsupportedModel",
    "answer",
    "scaled_config",
    "spec_of",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"model_worker.{_HOMES[name]}"), name)
