"""CREAM, PoSE and RandPos place what the authors' code placed, draw as it drew, and models read it the same way."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memory_service.errors import InvalidArgument
from model_worker.positions.cream import (
    Branch,
    BranchDraw,
    Cream,
    CreamDraw,
    Placement,
    Pose,
    PoseDraw,
    RandomPositions,
    Tokens,
    doubled_factor,
)
from model_worker.positions.scaling import Scaling, angle_tables, frequencies, scaled_config
from model_worker.training.collator import Collator, Mask, check_mask

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
BRANCHES = {"third": Branch.RELATIVITY, "small_k": Branch.CONTINUITY}
DRAWS = 20_000

Numbers = np.ndarray[Any, Any]


def found(part: str, function: str) -> list[Any]:
    """The cases of one function in one part of every index sidecar, each with the tensors beside it."""
    cases = []
    for sidecar in sorted(GOLDEN.glob("cream_index*.json")):
        listed = json.loads(sidecar.read_text())[part]
        for number, case in enumerate(case for case in listed if case["function"] == function):
            name = f"{sidecar.stem}-{number}-N{case['model_max_positions']}-F{case['factor']}-seed{case.get('seed')}"
            cases.append(pytest.param(case, sidecar.with_suffix(".safetensors"), id=name))
    return cases


def published(case: dict[str, Any], **options: Any) -> Cream:
    """CREAM as the authors' code, which takes the target over the window, rounded down, for the factor."""
    return Cream(
        case["model_max_positions"],
        int(case["factor"]),
        case.get("sigma") or 3.0,
        branch_draw=BranchDraw.CALL,
        tokens=Tokens.PUBLISHED,
        **options,
    )


def runs(numbers: Tensor) -> list[list[int]]:
    """The stretches [first, last] of consecutive integers."""
    parts = torch.tensor_split(numbers, (numbers.diff() != 1).nonzero().flatten() + 1)
    return [[int(part[0]), int(part[-1])] for part in parts]


def digest(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.numpy().astype("<i8").tobytes()).hexdigest()


def check(case: dict[str, Any], tensors: dict[str, Tensor], index: int, placement: Placement) -> None:
    """Compare a placement with all that the sidecar and the tensors tell about this example."""
    told = case["examples"][index]
    prefix = f"{case['function']}.seed{case['seed']}.N{case['model_max_positions']}.F{case['factor']}.ex{index}"
    for kind, have in {"position": placement.positions, "input_index": placement.tokens}.items():
        assert told.get(f"{kind}_runs", runs(have)) == runs(have)
        assert told.get(f"{kind}_sha256", digest(have)) == digest(have)
        want = tensors.get(f"{prefix}.{'position_ids' if kind == 'position' else kind}")
        assert want is None or torch.equal(have, want.long())
    assert "position_sha256" in told


# --- example by example ---


@pytest.mark.parametrize(("case", "file"), found("entries", "CREAM"))
def test_cream_places_the_authors_examples(case: dict[str, Any], file: Path) -> None:
    branch = BRANCHES[case["branch"]]
    cream = published(case, branches=(branch,))
    assert cream.segments(branch) == (case["head_length"], case["middle_length"], case["tail_length"])
    tensors = load_file(file)
    for index, told in enumerate(case["examples"]):
        assert cream.end_range(branch, told["uniform"]) == (told["end_low"], told["end_high"])
        draw = CreamDraw(branch, told["uniform"], told["end_id"])
        check(case, tensors, index, cream.place(told["input_length"], draw))


@pytest.mark.parametrize(("case", "file"), found("entries", "CREAM"))
def test_strict_cream_has_the_same_positions_and_no_token_twice(case: dict[str, Any], file: Path) -> None:
    branch = BRANCHES[case["branch"]]
    strict = Cream(case["model_max_positions"], case["factor"], case["sigma"], branches=(branch,))
    for told in case["examples"]:
        draw = CreamDraw(branch, told["uniform"], told["end_id"])
        if told["input_length"] < strict.window:
            with pytest.raises(InvalidArgument, match="too short"):
                strict.place(told["input_length"], draw)
            continue
        tokens, positions = strict.place(told["input_length"], draw)
        assert runs(positions) == told["position_runs"]
        assert (tokens.diff() > 0).all()
        assert tokens[0] == 0
        assert tokens[-1] == told["input_length"] - 1


@pytest.mark.parametrize(("case", "file"), found("entries", "PoSE"))
def test_pose_places_the_authors_examples(case: dict[str, Any], file: Path) -> None:
    pose = Pose(case["model_max_positions"], case["factor"])
    tensors = load_file(file)
    for index, told in enumerate(case["examples"]):
        draws = [told["first_chunk_draw"], told["second_chunk_end_draw"], told["skip_draw"]]
        assert pose.ranges(told["input_length"]) == tuple((first, last) for first, last, _ in draws)
        check(case, tensors, index, pose.place(told["input_length"], PoseDraw(*(drawn for *_, drawn in draws))))


@pytest.mark.parametrize(("case", "file"), found("entries", "RandPos"))
def test_randpos_places_the_authors_examples(case: dict[str, Any], file: Path) -> None:
    sampler = RandomPositions(case["model_max_positions"], case["factor"])
    tensors = load_file(file)
    theirs = random.Random(case["seed"])
    for index, told in enumerate(case["examples"]):
        draw = theirs.sample(range(sampler.factor * sampler.window), told["n"])
        check(case, tensors, index, sampler.place(told["input_length"], draw))


@pytest.mark.parametrize(("case", "file"), found("edge_cases", "CREAM"))
def test_edge_cases_are_placed_as_by_the_authors_or_refused(case: dict[str, Any], file: Path) -> None:
    # Their draws, repeated: random and numpy.random seeded alike, the branch first.
    theirs, uniforms = random.Random(case["seed"]), np.random.RandomState(case["seed"])
    branch = list(BRANCHES.values())[theirs.randint(0, 1)]
    assert branch is BRANCHES[case["branch"]]
    lengths = case["input_lengths"]
    try:
        cream = published(case, branches=(branch,))
    except InvalidArgument:
        assert case["result"] != "ok"
        return
    for number, length in enumerate(lengths):
        uniform = float(uniforms.rand())
        draw = CreamDraw(branch, uniform, theirs.randint(*cream.end_range(branch, uniform)))
        strict = Cream(cream.window, cream.factor, cream.sigma, branches=(branch,))
        if case["result"] == "ok":
            tokens, positions = cream.place(length, draw)
            if len(lengths) == 1:
                assert runs(positions) == case["position_runs"]
                assert runs(tokens) == case["input_index_runs"]
        elif length < cream.window:
            with pytest.raises(InvalidArgument):
                strict.place(length, draw)
        else:  # What stops their code, an odd window, is well here.
            tokens, positions = strict.place(length, draw)
            assert (tokens.diff() > 0).all() and (positions.diff() > 0).all()
            assert len(positions) == cream.window and positions[-1] == cream.factor * cream.window - 1
        for drawn in [one for one in case.get("draws", []) if one[0] == "rand"][number : number + 1]:
            assert uniform == drawn[1]


def test_a_factor_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="whole"):
        Cream(96, 1.5)  # type: ignore[arg-type]  # theirs quietly trains on plain positions


# --- on the whole ---


def close_means(have: Sequence[float] | Numbers, want: float, told_count: int) -> None:
    """The sidecar's rule: means agree within 4 standard errors of both samples."""
    numbers = np.asarray(have)
    assert abs(numbers.mean() - want) <= 4 * numbers.std() * math.sqrt(1 / told_count + 1 / len(numbers))


def close_spreads(have: Numbers, told: dict[str, Any]) -> None:
    """Means by the sidecar's rule; quantiles within 5 standard errors of the share below them."""
    close_means(have, told["mean"], told["n"])
    for share, value in ((float(share), value) for share, value in told["quantiles"].items()):
        slack = 5 * math.sqrt(share * (1 - share) * (1 / told["n"] + 1 / len(have)))
        assert (have < value).mean() - slack <= share <= (have <= value).mean() + slack


def close_shares(have: float, count: int, want: float, told_count: int) -> None:
    pooled = (have * count + want * told_count) / (count + told_count)
    assert abs(have - want) <= 4 * math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / told_count))


def same_histogram(have: Sequence[int], want: dict[str, int]) -> None:
    """Chi-square of two samples, bins of fewer than 10 joined to their neighbour; 5 standard deviations at most."""
    drawn = np.bincount(have, minlength=max(map(int, want)) + 1)
    bins, low = [], np.zeros(2)
    for value in range(len(drawn)):
        low += (drawn[value], want.get(str(value), 0))
        if low.sum() >= 10:
            bins.append(low)
            low = np.zeros(2)
    table = np.array(bins)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    freedom = len(table) - 1
    assert ((table - expected) ** 2 / expected).sum() <= freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("case", "file"), found("statistics", "CREAM"))
def test_cream_draws_as_the_authors_do(case: dict[str, Any], file: Path) -> None:
    cream = Cream(case["model_max_positions"], case["factor"], case["sigma"])
    generator = np.random.default_rng(3)
    draws = [cream.draw(generator) for _ in range(DRAWS)]
    share = np.mean([draw.branch is Branch.RELATIVITY for draw in draws])
    close_shares(float(share), DRAWS, case["share_third_branch"], case["draws"])
    for name, branch in BRANCHES.items():
        told = case[name]
        assert cream.segments(branch)[:2] == (told["head_length"], told["middle_length"])
        mine = [draw for draw in draws if draw.branch is branch]
        ends = np.array([draw.end for draw in mine])
        close_spreads(ends, told["middle_end_id"])
        halves = [doubled_factor(draw.uniform, cream.factor, cream.sigma) for draw in mine]
        same_histogram(halves, told["doubled_factor_histogram"])
        close_means(halves, told["doubled_factor_mean"], told["middle_end_id"]["n"])
        fractions = ends / (cream.factor * cream.window)
        close_means(fractions, told["middle_end_fraction_mean"], told["middle_end_id"]["n"])
        # Repeated tokens come with the authors' choice of tokens, and only with it.
        some = mine[:2000]
        again = published(case)
        repeated = [bool((again.place(case["input_length"], draw).tokens.diff() <= 0).any()) for draw in some]
        told_share = told["share_with_repeated_input_tokens"]
        close_shares(float(np.mean(repeated)), len(some), told_share, told["middle_end_id"]["n"])
        for draw in [draw for draw, repeats in zip(some, repeated, strict=True) if repeats]:
            assert (cream.place(case["input_length"], draw).tokens.diff() > 0).all()


@pytest.mark.parametrize(("case", "file"), found("statistics", "PoSE"))
def test_pose_draws_as_the_authors_do(case: dict[str, Any], file: Path) -> None:
    pose = Pose(case["model_max_positions"], case["factor"])
    generator = np.random.default_rng(3)
    draws = np.array([pose.draw(case["input_length"], generator) for _ in range(DRAWS)])
    for column, name in enumerate(["first_chunk_length", "second_chunk_end", "skip"]):
        close_spreads(draws[:, column], case[name])


@pytest.mark.parametrize(("case", "file"), found("statistics", "RandPos"))
def test_randpos_draws_as_the_authors_do(case: dict[str, Any], file: Path) -> None:
    sampler = RandomPositions(case["model_max_positions"], case["factor"])
    generator = np.random.default_rng(3)
    count = 5_000
    positions = np.sort([sampler.draw(case["input_length"], generator) for _ in range(count)], axis=1)
    for index, told in case["position_at_index"].items():
        close_spreads(positions[:, int(index)], told)
    # Gaps of one example hang together, so they count for as many as there are examples.
    gaps = np.diff(positions, axis=1).mean(1)
    close_means(gaps, case["gap"]["mean"], case["draws"])


# --- models ---

SCALINGS = {"yarn": Scaling.CREAM_YARN}  # The authors' "yarn" is not what everybody else calls so.


def told_models(part: str) -> list[Any]:
    """Every model sidecar with every name it lists in `part`."""
    cases = []
    for sidecar in sorted(GOLDEN.glob("cream_model*.json")):
        names = json.loads(sidecar.read_text())[part]
        cases += [pytest.param(sidecar, name, id=f"{sidecar.stem}-{name}") for name in names]
    return cases


@cache
def facts_of(sidecar: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(sidecar.read_text()), load_file(sidecar.with_suffix(".safetensors"))


def model_of(sidecar: Path, scaling: str, attention: str) -> LlamaForCausalLM:
    facts, tensors = facts_of(sidecar)
    told = dict(facts["hf_config"])
    rule = {"rope_type": "default", "rope_theta": told.pop("rope_theta")}
    config = LlamaConfig(**told, rope_parameters=rule, attn_implementation=attention)
    scaled = scaled_config(config, SCALINGS.get(scaling, scaling), facts["factor"], facts["original_max_positions"])
    assert scaled.max_position_embeddings == facts["scalings"][scaling]["max_position_embeddings"]
    model = LlamaForCausalLM(scaled).eval()
    model.load_state_dict({n: t.float() for n, t in tensors.items() if n.startswith(("model.", "lm_head."))})
    return model


class Told:
    """A sampler that gives the positions it is told, to whole texts."""

    def __init__(self, positions: Tensor):
        self.positions = positions
        self.window = positions.shape[1]

    def sample(self, lengths: Sequence[int], generator: np.random.Generator) -> list[Placement]:
        return [Placement(torch.arange(self.window), row) for row in self.positions.long()]


@pytest.mark.parametrize(
    ("attention", "mask"),
    [
        ("eager", Mask.ADDITIVE),
        ("eager", Mask.ONES),
        ("sdpa", Mask.ADDITIVE),
        ("sdpa", Mask.BOOLEAN),
        ("sdpa", Mask.ONES),
    ],
)
@pytest.mark.parametrize(("sidecar", "scaling"), told_models("scalings"))
def test_training_on_a_collated_batch_gives_the_authors_logits_and_loss(
    sidecar: Path, scaling: str, attention: str, mask: Mask
) -> None:
    facts, tensors = facts_of(sidecar)
    told, bounds = facts["scalings"][scaling], facts["tolerance"]
    model = model_of(sidecar, scaling, attention)
    collator = Collator(Told(tensors["train.position_ids"]), seed=0, mask=mask)
    batch = collator([{"input_ids": row} for row in tensors["train.input_ids"]])
    check_mask(model, batch)
    with torch.no_grad():
        out = model(**batch)
        torch.testing.assert_close(out.logits, tensors[f"train.{scaling}.logits"], **bounds["logits"])
        assert abs(float(out.loss) - told["mean_loss"]) <= bounds["loss"]
        for row, want in enumerate(told["loss_per_example"]):
            loss = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss
            assert abs(float(loss) - want) <= bounds["loss"]
        # What the mask is for.
        trapped = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        assert (trapped.logits - out.logits).abs().max() > 1


@pytest.mark.parametrize(("sidecar", "scaling"), told_models("scalings"))
def test_inference_over_the_whole_target_gives_the_authors_logits(sidecar: Path, scaling: str) -> None:
    facts, tensors = facts_of(sidecar)
    model = model_of(sidecar, scaling, "sdpa")
    with torch.no_grad():
        logits = model(input_ids=tensors["infer.input_ids"].long()).logits[:, tensors["infer.positions"].long()]
    torch.testing.assert_close(logits, tensors[f"infer.{scaling}.logits"], **facts["tolerance"]["logits"])


@pytest.mark.parametrize(("sidecar", "name"), told_models("rope_tables"))
def test_rope_tables_are_the_authors(sidecar: Path, name: str) -> None:
    facts, tensors = facts_of(sidecar)
    told, atol = facts["rope_tables"][name], facts["tolerance"]["rope"]["atol"]
    rule = frequencies(
        Scaling(SCALINGS.get(told["type"], told["type"])),
        told["head_dim"],
        told["rope_theta"],
        told["factor"],
        told["original_max_positions"],
    )
    assert rule.magnitude == pytest.approx(told["magnitude"])
    divided = told["factor"] if told["type"] == "linear" else 1  # The sidecar: before the division of positions.
    torch.testing.assert_close(rule.inv_freq * divided, tensors[f"{name}.inv_freq"], rtol=1e-6, atol=0)
    cos, sin = angle_tables(tensors[f"{name}.positions"], rule)
    torch.testing.assert_close(cos, tensors[f"{name}.cos"], rtol=0, atol=atol)
    torch.testing.assert_close(sin, tensors[f"{name}.sin"], rtol=0, atol=atol)
