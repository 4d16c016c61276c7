"""What is measured, behind one interface: our model with a memory anywhere, the plain reference, the bare model.

T tokens, V vocabulary, L memory layers, H heads, M planted tokens, D head_dim.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from memory_service.client import Memory
from memory_service.errors import InvalidArgument
from memory_service.types.operations import OperationState
from memory_service.types.specs import IndexPolicy
from model_worker.bench.reference import Cache, Reference
from model_worker.bench.subject import PLANTED_TOKENS, Mode, Quality, Setup
from model_worker.decoder.fitting import spec_of
from model_worker.decoder.model import FotModel
from model_worker.decoder.state import State
from model_worker.settings import Read

# Built when asked for, so that no background build takes the processor from what is measured.
INDEXED_WHEN_ASKED = IndexPolicy(min_tokens=1 << 40)


class Contender(Protocol):
    """A model that can be measured."""

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read a prompt [1, T] from nothing; the logits [V] after its last token."""

    def start(self, input_ids: Tensor, mode: Mode) -> None:
        """Read a prompt that `decode` goes on from, once for every mode."""

    def decode(self, token: Tensor, mode: Mode) -> Tensor:
        """Read one more token [1, 1]; the logits [V] after it."""

    def close(self) -> None: ...


def make(setup: Setup) -> Contender:
    """Build what a setup describes."""
    base = setup.geometry.build()
    if setup.kind == "reference":
        reference = Reference(base, setup.fot)
        return Plain(reference, _planted(reference, setup.planted))
    if setup.kind == "base":
        return Bare(base)
    if setup.kind == "fot":
        return Fot.open(base, setup)
    raise InvalidArgument(f"a contender is fot, reference or base, got {setup.kind!r}")


class Fot:
    """Our model. Planted tokens are documents of its memory."""

    def __init__(self, model: FotModel):
        self._model = model
        self._states: dict[str, State] = {}

    @classmethod
    def open(cls, base: Any, setup: Setup) -> Fot:
        """A model over the memory at the setup's target, made if there is none."""
        if not setup.fot.mem_layers:
            return cls(FotModel(base, setup.fot))
        spec = spec_of(base, setup.fot, index=INDEXED_WHEN_ASKED)
        memory = Memory.open(setup.target, setup.name, spec)
        if setup.planted is not None:
            _plant(memory, setup.planted)
        return cls(FotModel(base, setup.fot, memory, owns_memory=True))

    def prefill(self, input_ids: Tensor) -> Tensor:
        answer = self._model(input_ids, logits_to_keep=1)
        answer.past_key_values.close()
        return _last(answer.logits)

    def start(self, input_ids: Tensor, mode: Mode) -> None:
        self._states[mode.name] = state = self._model.start(mode.recall)
        self._model(input_ids, past_key_values=state, logits_to_keep=1)

    def decode(self, token: Tensor, mode: Mode) -> Tensor:
        return _last(self._model(token, past_key_values=self._states[mode.name], logits_to_keep=1).logits)

    def quality(self, input_ids: Tensor, mode: Mode) -> Quality:
        """Recall and captured mass over the queries of these tokens [1, T], read one by one as decoding does."""
        heard: list[Read] = []
        with self._model.start(replace(mode.recall, measure=True, on_read=heard.append)) as state:
            for token in input_ids.unbind(1):
                self._model(token[None], past_key_values=state, logits_to_keep=1)
        found = [read.attended.measured for read in heard if read.attended.measured is not None]
        recalls, masses = zip(*((one.recall, one.captured_mass) for one in found), strict=True)
        return Quality(statistics.fmean(recalls), statistics.fmean(masses))

    def close(self) -> None:
        for state in self._states.values():
            state.close()
        self._model.close()


class Plain:
    """The reference. Planted tokens are in its memory from the start."""

    def __init__(self, reference: Reference, cache: Cache | None):
        self._reference = reference
        self._cache = cache
        self._caches: dict[str, Cache] = {}

    def prefill(self, input_ids: Tensor) -> Tensor:
        return _last(self._reference.forward(input_ids)[0])

    def start(self, input_ids: Tensor, mode: Mode) -> None:
        _, self._caches[mode.name] = self._reference.forward(input_ids, cache=self._cache)

    def decode(self, token: Tensor, mode: Mode) -> Tensor:
        logits, self._caches[mode.name] = self._reference.forward(token, cache=self._caches[mode.name])
        return _last(logits)

    def close(self) -> None:
        self._caches.clear()


class Bare:
    """The transformers model as it is, with torch's own attention and one window over everything."""

    def __init__(self, base: Any):
        self._base = base

    def prefill(self, input_ids: Tensor) -> Tensor:
        return _last(self._base(input_ids, logits_to_keep=1).logits)

    def start(self, input_ids: Tensor, mode: Mode) -> None:
        raise InvalidArgument("the bare model has no memory to decode with")

    def decode(self, token: Tensor, mode: Mode) -> Tensor:
        raise InvalidArgument("the bare model has no memory to decode with")

    def close(self) -> None:
        pass


def _plant(memory: Memory, file: str) -> None:
    """Store a file's keys and values as documents, and index them."""
    planted = load_file(Path(file))
    for first in range(0, planted["keys"].shape[2], PLANTED_TOKENS):
        part = slice(first, first + PLANTED_TOKENS)
        memory.put(f"planted-{first}", planted["keys"][:, :, part], planted["values"][:, :, part])
    built = memory.wait(memory.start("index"))
    assert built.state is OperationState.DONE, built.message


def _planted(reference: Reference, file: str | None) -> Cache | None:
    if file is None:
        return None
    planted = load_file(Path(file))
    cache = reference.empty(1)
    layers = list(cache.layers)
    for place, layer in enumerate(reference.config.mem_layers):
        keys, values = planted["keys"][place], planted["values"][place]
        layers[layer] = replace(layers[layer], memory_keys=keys[None].clone(), memory_values=values[None].clone())
    valid = torch.ones(1, planted["keys"].shape[2], dtype=torch.bool)
    return replace(cache, layers=tuple(layers), memory_valid=valid)


def _last(logits: Tensor) -> Tensor:
    return logits[0, -1].clone()
