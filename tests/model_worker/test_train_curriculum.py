"""Levels, what a step draws, the course of the learning rate, and the optimizers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from model_worker.training.config import Kind, Level, OptimizerConfig
from model_worker.training.curriculum import Curriculum, Draw
from model_worker.training.muon import Muon, orthogonalised
from model_worker.training.optimizers import Optimizers, schedule
from model_worker.training.shapes import Shape
from tests.model_worker.tiny import tiny_model

EASY, HARD = Shape(group=1), Shape(group=8)


def of(level: int, shape: Shape = EASY) -> Draw:
    return Draw(level, shape, 1.0)


# --- levels ---


def test_a_level_is_passed_when_its_answers_are_right_and_its_least_steps_are_over() -> None:
    curriculum = Curriculum([Level((EASY,), until_accuracy=0.8, min_steps=3), Level((HARD,))], seed=0)
    assert [curriculum.answered(step, of(0), 1.0) for step in (1, 2, 3)] == [False, False, True]
    assert curriculum.level == 1
    assert curriculum.passed == [(3, "100% of answers right")]


def test_the_accuracy_of_a_level_is_the_exponential_mean_of_its_own_batches() -> None:
    curriculum = Curriculum([Level((EASY,), until_accuracy=0.99, smoothing=0.5), Level((HARD,))], seed=0)
    curriculum.answered(1, of(0), 0.0)
    curriculum.answered(2, of(0), 1.0)
    assert curriculum.accuracy == pytest.approx(1.0 * 2 / 3)  # Weights 1/2 and 1.
    curriculum.answered(3, of(0), None)  # A batch without answers says nothing.
    assert curriculum.accuracy == pytest.approx(2 / 3)


def test_batches_of_earlier_levels_do_not_count_for_a_level() -> None:
    levels = [Level((EASY,), max_steps=1), Level((HARD,), until_accuracy=0.5, min_steps=1), Level((HARD,))]
    curriculum = Curriculum(levels, seed=0)
    curriculum.answered(1, of(0), 1.0)
    assert not curriculum.answered(2, of(0), 1.0)
    assert curriculum.accuracy == 0.0
    assert curriculum.answered(3, of(1), 1.0)


def test_a_level_that_is_not_learnt_ends_when_its_most_steps_are_over_and_says_so() -> None:
    levels = [Level((EASY,), until_accuracy=0.9, min_steps=1, max_steps=2), Level((HARD,))]
    curriculum = Curriculum(levels, seed=0)
    assert [curriculum.answered(step, of(0), 0.25) for step in (1, 2)] == [False, True]
    assert curriculum.passed == [(2, "2 steps are over, at 25% of answers right")]


def test_the_last_level_is_never_left() -> None:
    curriculum = Curriculum([Level((EASY,), until_accuracy=0.1, min_steps=1, max_steps=1)], seed=0)
    assert not any(curriculum.answered(step, of(0), 1.0) for step in range(1, 5))


def test_a_share_of_batches_comes_from_earlier_levels_and_shapes_come_by_weight() -> None:
    often, seldom = Shape(keys=1, weight=3.0), Shape(keys=2, weight=1.0)
    levels = [Level((EASY,), max_steps=1), Level((often, seldom), earlier=0.2, temperatures=(1.0, 0.5))]
    curriculum = Curriculum(levels, seed=0)
    curriculum.answered(1, of(0), 1.0)
    draws = [curriculum.draw(step) for step in range(2000)]
    seen = Counter(draw.shape for draw in draws)
    assert seen[EASY] == pytest.approx(400, abs=60)
    assert seen[often] == pytest.approx(1200, abs=80)
    assert seen[seldom] == pytest.approx(400, abs=60)
    assert {draw.temperature for draw in draws if draw.level == 0} == {1.0}
    assert Counter(draw.temperature for draw in draws if draw.level)[0.5] == pytest.approx(800, abs=80)


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    levels = [Level((EASY, HARD), temperatures=(1.0, 0.5, 0.3))]
    one, other = Curriculum(levels, seed=5), Curriculum(levels, seed=5)
    forwards = [one.draw(step) for step in range(20)]
    assert [other.draw(step) for step in reversed(range(20))] == forwards[::-1]
    assert [Curriculum(levels, seed=6).draw(step) for step in range(20)] != forwards


def test_a_curriculum_goes_on_from_its_state() -> None:
    levels = [Level((EASY,), until_accuracy=0.6, min_steps=2), Level((HARD,), until_accuracy=0.6), Level((HARD,))]
    one, other = Curriculum(levels, seed=0), Curriculum(levels, seed=0)
    for step in (1, 2, 3):
        one.answered(step, of(one.level), 0.7)
    other.load(one.state())
    for step in range(4, 60):
        assert one.answered(step, of(one.level), 0.7) == other.answered(step, of(other.level), 0.7)
    assert one.state() == other.state() and one.level == 2


# --- the learning rate ---


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = OptimizerConfig(warmup=4, decay_fraction=0.4, decay_to=0.1)
    factors = [schedule(step, 10, config) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])


def test_without_decay_and_warm_up_the_learning_rate_is_constant() -> None:
    config = OptimizerConfig(warmup=0, decay_fraction=0.0)
    assert {schedule(step, 5, config) for step in range(5)} == {1.0}


# --- optimizers ---


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 24, 8), (1, 8, 24)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    made = orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert made.shape == shape
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_takes_the_steps_that_torchs_own_would_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # Which torch's does first of all.
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    optimizers = [
        Muon(ours, lr=0.1, weight_decay=0.1, momentum=0.9),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.9),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.allclose(one, before, atol=0.01)


def test_muon_gets_the_matrices_inside_layers_and_adamw_the_rest() -> None:
    model = tiny_model("qwen2")  # With biases and an untied head.
    optimizers = Optimizers(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1.0)
    kept = optimizers.tensors()
    by_muon = {name.removesuffix(".momentum") for name in kept if name.endswith(".momentum")}
    by_adamw = {name.removesuffix(".exp_avg") for name in kept if name.endswith(".exp_avg")}
    assert by_muon | by_adamw == {name for name, _ in model.named_parameters()}
    assert by_adamw.isdisjoint(by_muon)
    assert all("layers." in name and name.endswith("proj.weight") for name in by_muon)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"} < by_adamw


def test_adamw_alone_takes_everything() -> None:
    model = tiny_model()
    optimizers = Optimizers(model, OptimizerConfig(kind=Kind.ADAMW))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1.0)
    assert not any(name.endswith(".momentum") for name in optimizers.tensors())


def test_gradients_are_clipped_and_dropped_after_a_step() -> None:
    model = tiny_model()
    optimizers = Optimizers(model, OptimizerConfig(clip=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert float(optimizers.step(1.0)) == pytest.approx(count**0.5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizers.tensors()["model.norm.weight.exp_avg"].max() == pytest.approx(0.1 * 0.5 / count**0.5, rel=1e-3)
