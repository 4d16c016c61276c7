"""CREAM, PoSE and RandPos: what an example is, whatever is drawn, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_service.errors import InvalidArgument
from model_worker.positions.cream import (
    Branch,
    BranchDraw,
    Cream,
    CreamDraw,
    Middle,
    Pose,
    PoseDraw,
    RandomPositions,
    Sampler,
    Tokens,
    doubled_factor,
)

SAMPLERS: list[Sampler] = [
    Cream(48, 4),
    Cream(48, 4, middle=Middle.CENTRED, branch_draw=BranchDraw.CALL),
    Cream(48, 4, tokens=Tokens.PUBLISHED),
    Pose(48, 4),
    RandomPositions(48, 4),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def middle_ends(cream: Cream, count: int, branch: Branch = Branch.RELATIVITY) -> list[int]:
    generator = rng()
    return [cream.draw(generator, branch).end for _ in range(count)]


# --- all recipes ---


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_same_generator_gives_the_same_examples_and_another_gives_others(sampler: Sampler) -> None:
    first, same, other = (sampler.sample([100] * 8, rng(seed)) for seed in (1, 1, 2))
    pairs = list(zip(first, same, strict=True))
    assert all(torch.equal(a.tokens, b.tokens) and torch.equal(a.positions, b.positions) for a, b in pairs)
    assert any(not torch.equal(a.positions, b.positions) for a, b in zip(first, other, strict=True))


@given(
    window=st.integers(3, 70),
    factor=st.integers(1, 9),
    sigma=st.floats(0.01, 50),
    longer=st.integers(0, 700),
    seed=st.integers(0, 2**32),
    middle=st.sampled_from(Middle),
)
def test_an_example_of_cream_is_a_window_of_tokens_in_order_from_both_ends_of_text_and_target(
    window: int, factor: int, sigma: float, longer: int, seed: int, middle: Middle
) -> None:
    branches = tuple(Branch) if 8 * factor <= window else (Branch.RELATIVITY,)
    cream = Cream(window, factor, sigma, middle=middle, branches=branches)
    length, reach = window + longer, window * factor
    for tokens, positions in cream.sample([length] * 4, rng(seed)):
        assert len(tokens) == len(positions) == window
        assert (tokens.diff() > 0).all()
        assert (positions.diff() > 0).all()
        assert tokens[0] == 0 and tokens[-1] == length - 1
        assert positions[0] == 0 and positions[-1] == reach - 1


@given(window=st.integers(1, 70), factor=st.integers(1, 9), length=st.integers(1, 900), seed=st.integers(0, 2**32))
def test_the_baselines_shorten_to_the_text_and_stay_in_it_and_in_the_target(
    window: int, factor: int, length: int, seed: int
) -> None:
    for sampler in (Pose(window, factor), RandomPositions(window, factor)):
        [(tokens, positions)] = sampler.sample([length], rng(seed))
        assert len(tokens) == len(positions) == min(window, length)
        assert tokens[0] == 0 and tokens[-1] < length
        assert (tokens.diff() > 0).all()
        assert (positions.diff() > 0).all()
        assert positions[0] >= 0 and positions[-1] < window * factor


@pytest.mark.parametrize("recipe", [Cream, Pose, RandomPositions])
@pytest.mark.parametrize(("window", "factor"), [(0, 4), (64, 0), (64, 1.5), (64.0, 2), (64, -1)])
def test_windows_and_factors_are_whole_and_positive(recipe: type, window: int, factor: int) -> None:
    with pytest.raises(InvalidArgument, match=r"whole number|at least 1"):
        recipe(window, factor)


# --- CREAM ---


def test_with_factor_1_cream_trains_on_plain_positions() -> None:
    for branch in Branch:
        [(tokens, positions)] = Cream(60, 1, branches=(branch,)).sample([60], rng())
        assert tokens.tolist() == positions.tolist() == list(range(60))


def test_head_and_tail_must_fit_the_window() -> None:
    with pytest.raises(InvalidArgument, match="window of 64 tokens or more"):
        Cream(60, 8)
    with pytest.raises(InvalidArgument, match="do not fit"):
        Cream(2, 1, branches=(Branch.RELATIVITY,))
    assert Cream(60, 8, branches=(Branch.RELATIVITY,)).segments(Branch.RELATIVITY) == (20, 20, 20)
    just = Cream(64, 8, branches=(Branch.CONTINUITY,))
    [(tokens, positions)] = just.sample([200], rng())
    assert just.segments(Branch.CONTINUITY).middle == 0
    assert positions.tolist() == [*range(32), *range(480, 512)]
    assert tokens.tolist() == [*range(32), *range(168, 200)]


def test_sigma_and_branches_are_checked() -> None:
    for sigma in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidArgument, match="sigma"):
            Cream(64, 4, sigma)
    with pytest.raises(InvalidArgument, match="branch"):
        Cream(64, 4, branches=())


def test_a_text_shorter_than_the_window_is_refused_rather_than_wrapped_around() -> None:
    with pytest.raises(InvalidArgument, match="95 tokens is too short"):
        Cream(96, 4).sample([96, 95], rng())


def test_published_tokens_wrap_around_in_short_texts_until_there_is_none_to_take() -> None:
    published = Cream(96, 4, tokens=Tokens.PUBLISHED, branches=(Branch.CONTINUITY,))
    tokens, _ = published.place(70, CreamDraw(Branch.CONTINUITY, 0.78, 286))
    assert tokens.tolist() == [*range(16), *range(60, 70), *range(54), *range(54, 70)]
    with pytest.raises(InvalidArgument, match="too short"):
        published.place(30, CreamDraw(Branch.CONTINUITY, 0.5, 221))


def test_a_middle_that_reaches_into_the_tail_of_the_text_is_taken_from_before_it() -> None:
    draw = CreamDraw(Branch.RELATIVITY, 0.1, 40)
    strict, published = Cream(48, 4), Cream(48, 4, tokens=Tokens.PUBLISHED)
    assert strict.place(48, draw).tokens.tolist() == list(range(48))
    assert published.place(48, draw).tokens.tolist() == [*range(16), *range(25, 41), *range(32, 48)]
    assert torch.equal(strict.place(48, draw).positions, published.place(48, draw).positions)


def test_an_odd_window_takes_every_number_of_halves() -> None:
    cream = Cream(97, 4)
    ends = {cream.end_range(Branch.RELATIVITY, uniform) for uniform in np.linspace(0, 0.999, 200)}
    assert len(ends) == 7  # 2 to 8 halves
    assert all(first <= last for first, last in ends)


def test_the_branch_is_drawn_for_every_example_or_once_for_all() -> None:
    def heads(branch_draw: BranchDraw) -> list[int]:
        sampled = Cream(96, 4, branch_draw=branch_draw).sample([384] * 64, rng(1))
        return [int((positions == torch.arange(96)).sum()) for _, positions in sampled]

    every, once = heads(BranchDraw.EXAMPLE), heads(BranchDraw.CALL)
    relative = [head >= 32 for head in every]
    assert 16 < sum(relative) < 48
    assert len({head >= 32 for head in once}) == 1


def test_a_draw_that_does_not_fit_is_refused() -> None:
    for end in (30, 176):
        with pytest.raises(InvalidArgument, match="cannot end at position"):
            Cream(48, 4).place(48, CreamDraw(Branch.RELATIVITY, 0.5, end))


def test_the_number_of_halves_has_the_distribution_of_a_gaussian_cut_off_at_the_ends() -> None:
    """P(r) = Φ((r + 1 − μ)/σ) − Φ((r − μ)/σ), with all below 2 at 2 and all above 2F at 2F."""
    drawn = np.bincount([doubled_factor(uniform, 2, 3.0) for uniform in np.linspace(0, 1, 20001)], minlength=5)
    assert drawn[2:] / 20001 == pytest.approx([0.500, 0.1306, 0.3694], abs=1e-3)


def test_the_published_middle_ends_at_a_third_and_the_centred_one_stands_in_the_centre() -> None:
    for factor in (8, 64):
        sigma = 3 * factor / 8
        published = middle_ends(Cream(4096, factor), 2000)
        centred = middle_ends(Cream(4096, factor, sigma, middle=Middle.CENTRED), 2000)
        assert 0.32 < np.mean(published) / (4096 * factor) < 0.37
        assert (np.mean(centred) - 1366 / 2) / (4096 * factor) == pytest.approx(0.5, abs=0.01)
        assert np.std(centred) / (4096 * factor) == pytest.approx(3 / 16, rel=0.2)  # less: it is truncated


def test_the_centred_middle_is_flat_when_sigma_is_large_and_still_when_it_is_small() -> None:
    flat = Cream(48, 4, 1e6, middle=Middle.CENTRED)
    first, last = 16 + 16 - 1, 192 - 16 - 1
    counts = np.histogram(middle_ends(flat, 4000), bins=5, range=(first, last + 1))[0]
    assert counts == pytest.approx(800, rel=0.15)
    still = Cream(48, 4, 1e-3, middle=Middle.CENTRED)
    assert set(middle_ends(still, 50)) == {(192 + 16) // 2 - 1}
    for uniform in (0.0, 1.0):
        assert flat.end_range(Branch.RELATIVITY, uniform)[0] in (first, last)


# --- baselines ---


def test_pose_takes_its_second_chunk_from_the_text_it_may_use() -> None:
    assert Pose(96, 4).ranges(5000) == ((1, 48), (96, 384), (0, 288))
    assert Pose(96, 4, longest=480).ranges(5000) == ((1, 48), (96, 480), (0, 288))
    assert Pose(96, 4, longest=40).ranges(5000) == ((1, 20), (40, 40), (0, 344))
    tokens, positions = Pose(6, 4).place(20, PoseDraw(first=2, end=15, skip=10))
    assert tokens.tolist() == [0, 1, 11, 12, 13, 14]
    assert positions.tolist() == [0, 1, 12, 13, 14, 15]


def test_pose_refuses_a_draw_of_another_text_and_an_empty_text() -> None:
    with pytest.raises(InvalidArgument, match="no draw for a text of 8"):
        Pose(6, 4).place(8, PoseDraw(first=2, end=15, skip=10))
    for sampler in (Pose(6, 4), RandomPositions(6, 4)):
        with pytest.raises(InvalidArgument, match="length of a text"):
            sampler.sample([0], rng())


def test_randpos_with_factor_1_is_ordinary_training() -> None:
    [(tokens, positions)] = RandomPositions(32, 1).sample([100], rng())
    assert tokens.tolist() == positions.tolist() == list(range(32))


def test_randpos_wants_as_many_positions_as_tokens() -> None:
    with pytest.raises(InvalidArgument, match="3 positions were drawn for 6 tokens"):
        RandomPositions(6, 4).place(8, [1, 2, 3])
