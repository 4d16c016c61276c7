"""The models that come with the package do what their cards say, and no longer once their memory layer is spoilt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from memory_service import Client
from model_worker import reference
from model_worker.decoder.fitting import config_of
from model_worker.evaluation import dictionary, lookup, passkey
from model_worker.evaluation.asking import Asking, MemoryAsker
from model_worker.evaluation.dictionary_memory import Player
from model_worker.evaluation.passkey import Plan
from model_worker.evaluation.subject import Subject
from model_worker.hf import checkpoint
from model_worker.settings import FotConfig
from model_worker.tasks.tokens import tokens_of
from model_worker.training import config as configuration
from model_worker.training import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

as_shipped_or_spoilt = pytest.mark.parametrize("spoilt", [False, True], ids=["as shipped", "spoilt"])


def opened(name: str, spoilt: bool) -> tuple[PreTrainedModel, FotConfig]:
    """A shipped model; spoilt, its memory layer asks for something else than it was trained to."""
    base, fields = checkpoint.load(reference.path(name))
    fot = config_of(base, fields)
    if spoilt:
        (layer,) = fot.mem_layers
        weight = base.get_parameter(f"model.layers.{layer}.self_attn.q_proj.weight")
        with torch.no_grad():
            weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    return base, fot


@as_shipped_or_spoilt
def test_the_reference_model_finds_passkeys_in_16k_tokens(spoilt: bool) -> None:
    base, fot = opened("reference", spoilt)
    plan = Plan((16_384,), trials=10, depths=10)
    with Client.open(":memory:") as client:
        asker = MemoryAsker(base, fot, client, Asking())
        report = passkey.run(plan, plan.questions(tokens_of(reference.path()), fot.last_context_length), asker)
    assert report.figures["accuracy"] == (0 if spoilt else 1)
    assert spoilt or all(row["key_mass"] > 0.2 for row in report.rows)


@as_shipped_or_spoilt
def test_the_look_up_model_copies_whole_uuids(spoilt: bool) -> None:
    base, fot = opened("lookup", spoilt)
    with Subject(base, fot, tokens_of(reference.path("lookup")), name="lookup") as subject:
        report = lookup.run(subject, lengths=(8192,), questions=40)
    right = report.figures["records_right_8192"]
    assert right == 0 if spoilt else right >= 0.95


@as_shipped_or_spoilt
def test_the_dictionary_model_knows_every_definition(spoilt: bool) -> None:
    base, fot = opened("dictionary", spoilt)
    report = dictionary.run(Player.of(base, fot, "dictionary"), sizes=(16_384,), questions=100, engines=("exact",))
    right = report.figures["record_16k_exact"]
    assert right == 0 if spoilt else right >= 0.98


@pytest.mark.parametrize("name", reference.NAMES)
def test_the_file_that_ships_with_a_model_is_what_trained_it(name: str) -> None:
    folder = reference.path(name)
    trained = dict(record.read(folder).config)
    del trained["start"]
    assert configuration.read(folder / "train.toml").described() == trained
