"""A training on disk, whole or not at all: one safetensors file, replaced in one move, that says where it stands."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memory_service.errors import DataLoss, InvalidArgument

NAME = "snapshot.safetensors"
_FORMAT = "fot-training-1"
_PATHS = ("model.path", "model.tokenizer")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the rest of a training depends on."""

    step: int  # Steps done.
    config: Mapping[str, Any]  # What `TrainConfig.described` gave.
    curriculum: Mapping[str, Any]
    tokens: int
    seconds: float
    weights: Mapping[str, Tensor]  # What is trained and what the model keeps beside it.
    optimizers: Mapping[str, Tensor]


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder`/snapshot.safetensors: aside, to disk, then in place of the one before. A kill leaves either."""
    told = {
        "step": snapshot.step,
        "config": snapshot.config,
        "curriculum": snapshot.curriculum,
        "tokens": snapshot.tokens,
        "seconds": snapshot.seconds,
    }
    tensors = {f"weights.{name}": tensor for name, tensor in snapshot.weights.items()}
    tensors |= {f"optimizers.{name}": tensor for name, tensor in snapshot.optimizers.items()}
    aside, place = folder / f"{NAME}.partial", folder / NAME
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        aside,
        metadata={"format": _FORMAT, "training": json.dumps(told)},
    )
    _sync(aside)
    aside.replace(place)
    _sync(folder)
    return place


def find(folder: Path) -> Path:
    """Where the snapshot in `folder` is. Raises InvalidArgument if there is none."""
    place = folder / NAME
    if not place.is_file():
        raise InvalidArgument(f"there is nothing to resume: {place} does not exist; train without --resume")
    return place


def read(folder: Path) -> Snapshot:
    """The snapshot in `folder`. Raises InvalidArgument if there is none, DataLoss if it cannot be read."""
    place = find(folder)
    try:
        with safe_open(place, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise DataLoss(f"{place} cannot be read ({error}): remove it and train from the start") from error
    if metadata.get("format") != _FORMAT:
        raise InvalidArgument(f"{place} is no snapshot of this version's training ({metadata.get('format')!r})")
    told = json.loads(metadata["training"])

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return Snapshot(**told, weights=part("weights."), optimizers=part("optimizers."))


def check_same(snapshot: Snapshot, config: Mapping[str, Any]) -> None:
    """Raise InvalidArgument, naming every key that differs, unless the snapshot is one of this training."""
    # Where checkpoint and tokenizer lie may change: what they hold is in "start".
    then, now = ({name: one for name, one in _flat(x).items() if name not in _PATHS} for x in (snapshot.config, config))
    differ = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if differ:
        told = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in differ)
        raise InvalidArgument(f"the snapshot belongs to another training: {told}. Give it another --out, or undo that")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested tables as {"optimizer.muon_lr": 0.02, "levels.0.lr": 1.0}."""
    if isinstance(value, Mapping):
        items = [(str(key), one) for key, one in value.items()]
    elif isinstance(value, list):
        items = [(str(number), one) for number, one in enumerate(value)]
    else:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, one in items:
        flat |= _flat(one, f"{name}.{key}" if name else key)
    return flat


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
