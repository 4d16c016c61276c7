"""Self-Extend's rule and its attention equal what the authors' code gave, row by row."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model_worker.attention import grouped
from model_worker.positions.rope import Rope, rotate
from model_worker.positions.self_extend import far_keys, relative_positions
from model_worker.settings import LogitScaling, SelfExtend

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))


def found(prefix: str) -> list[Any]:
    """The entries of this kind in every `selfextend_unit*` sidecar."""
    return [
        pytest.param(sidecar, name, id=f"{sidecar.stem}-{name}")
        for sidecar in sorted(GOLDEN.glob("selfextend_unit*.json"))
        for name in _told(sidecar)["entries"]
        if name.startswith(prefix)
    ]


@lru_cache
def _told(sidecar: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(sidecar.read_text())
    return told


@lru_cache
def _tensors(sidecar: Path) -> dict[str, Tensor]:
    return load_file(sidecar.with_suffix(".safetensors"))


class Layer:
    """One attention layer of the authors': its inputs, what it gave, and the rule it followed."""

    def __init__(self, sidecar: Path, name: str):
        facts, tensors = _told(sidecar)["entries"][name], _tensors(sidecar)
        self.query, self.key, self.value, self.context = (tensors[f"{name}.{x}"] for x in ("q", "k", "v", "context"))
        self.dim = facts["head_dim"]
        self.rope = Rope(1.0 / facts["rope_theta"] ** (torch.arange(0, self.dim, 2).float() / self.dim))
        scaling = LogitScaling(facts["logit_scaling"])
        base = None if scaling is LogitScaling.NONE else facts["scale_base"]
        self.config = SelfExtend(facts["group_size"], facts["window_size"], scaling, base)
        self.prefill = facts["prefill_length"]
        tolerance = _told(sidecar)["tolerance"]
        self.bars = {"atol": tolerance["atol"], "rtol": tolerance["rtol"]}

    @property
    def rule(self) -> tuple[Rope, SelfExtend, float]:
        return self.rope, self.config, self.dim**-0.5


def test_there_are_cases() -> None:
    assert found("relpos.")
    assert found("attn.")


@pytest.mark.parametrize(("sidecar", "name"), found("relpos."))
def test_relative_positions_are_those_measured_in_the_authors_attention(sidecar: Path, name: str) -> None:
    facts = _told(sidecar)["entries"][name]
    table = relative_positions(facts["length"], SelfExtend(facts["group_size"], facts["window_size"]))
    assert torch.equal(table, _tensors(sidecar)[name].long())


@pytest.mark.parametrize(("sidecar", "name"), found("attn."))
def test_prefill_and_steps_after_it_give_the_authors_context(sidecar: Path, name: str) -> None:
    layer = Layer(sidecar, name)
    until = layer.prefill
    context = [grouped.prefill(*(x[:, :, :until] for x in (layer.query, layer.key, layer.value)), *layer.rule).output]
    for stop in range(until + 1, layer.query.shape[2] + 1):
        query, key, value = layer.query[:, :, stop - 1 : stop], layer.key[:, :, :stop], layer.value[:, :, :stop]
        context.append(grouped.trailing(query, key, value, *layer.rule).output)
    torch.testing.assert_close(torch.cat(context, 2), layer.context, **layer.bars)


@pytest.mark.parametrize(("sidecar", "name"), found("attn."))
def test_steps_over_keys_kept_rotated_give_the_authors_context(sidecar: Path, name: str) -> None:
    layer = Layer(sidecar, name)
    places = torch.arange(layer.key.shape[2])
    near = rotate(layer.key, layer.rope.angles(places, torch.float32))
    far = rotate(layer.key, layer.rope.angles(far_keys(places, layer.config), torch.float32))
    context = [
        grouped.trailing_rotated(
            layer.query[:, :, stop - 1 : stop],
            near[:, :, :stop],
            far[:, :, :stop],
            layer.value[:, :, :stop],
            *layer.rule,
            positions=places[stop - 1 : stop],
        ).output
        for stop in range(1, len(places) + 1)
    ]
    torch.testing.assert_close(torch.cat(context, 2), layer.context, **layer.bars)


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
@pytest.mark.parametrize(("sidecar", "name"), found("attn."))
def test_prefill_in_chunks_gives_the_authors_context(sidecar: Path, name: str, chunk: int) -> None:
    layer = Layer(sidecar, name)
    context = [
        grouped.trailing(query, layer.key[:, :, :stop], layer.value[:, :, :stop], *layer.rule).output
        for query, stop in zip(layer.query.split(chunk, 2), _ends(layer.query.shape[2], chunk), strict=True)
    ]
    torch.testing.assert_close(torch.cat(context, 2), layer.context, **layer.bars)


def _ends(length: int, chunk: int) -> list[int]:
    return [min(start + chunk, length) for start in range(0, length, chunk)]
