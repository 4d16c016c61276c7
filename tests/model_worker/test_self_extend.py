"""Self-Extend's rule, how far it reaches and what it says when that is not far enough."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_service.errors import InvalidArgument
from model_worker.errors import InputTooLong
from model_worker.positions.self_extend import (
    advice,
    advised_group,
    check_reach,
    query_scale,
    reach,
    relative_positions,
    smallest_group,
)
from model_worker.settings import LogitScaling, SelfExtend

SMALL = st.builds(SelfExtend, group=st.integers(1, 9), window=st.integers(1, 24))


def test_near_keys_keep_their_place_and_far_ones_share_it() -> None:
    table = relative_positions(8, SelfExtend(group=2, window=4))
    assert table[7].tolist() == [5, 5, 4, 4, 3, 2, 1, 0]  # 7 // 2 + 4 - 4 // 2 = 5, minus 0, 0, 1, 1; then 3 to 0.
    assert table[6].tolist() == [5, 5, 4, 3, 2, 1, 0, -1]


def test_pairs_at_one_distance_may_stand_one_apart() -> None:
    table = relative_positions(9, SelfExtend(group=3, window=3))
    assert (table[5, 1], table[6, 2]) == (3, 4)  # 1 - 0 + 2 and 2 - 0 + 2: not floor(4 / 3) + 2 for both.


@given(SMALL, st.integers(1, 60))
@settings(max_examples=60)
def test_groups_of_one_and_windows_as_long_as_the_text_are_ordinary_positions(config: SelfExtend, length: int) -> None:
    places = torch.arange(length)
    ordinary = (places[:, None] - places).clamp(min=-1)
    assert torch.equal(relative_positions(length, SelfExtend(1, config.window)), ordinary)
    assert torch.equal(relative_positions(length, SelfExtend(config.group, max(config.window, length))), ordinary)


@given(SMALL, st.integers(1, 30))
@settings(max_examples=200)
def test_reach_is_the_longest_text_whose_places_were_all_trained(config: SelfExtend, trained: int) -> None:
    longest = reach(config, trained)
    assert relative_positions(longest, config).max() <= trained - 1
    assert relative_positions(longest + 1, config).max() > trained - 1


def test_reach_is_the_papers_when_the_window_divides() -> None:
    assert reach(SelfExtend(group=4, window=512), trained=2048) == (2048 - 512) * 4 + 512
    assert reach(SelfExtend(group=5, window=1024), trained=4096) == 16_380  # Its README says 16384.


@pytest.mark.parametrize(
    ("trained", "window", "length", "least", "advised"),
    [
        (2048, 512, 4096, 3, 5),
        (2048, 512, 8192, 6, 10),
        (4096, 1024, 16_384, 6, 10),
        (4096, 1024, 32_768, 11, 19),
        (8192, 1024, 65_536, 10, 15),
        (32_768, 4096, 131_072, 5, 8),
    ],
)
def test_groups_for_common_models_and_lengths(trained: int, window: int, length: int, least: int, advised: int) -> None:
    assert smallest_group(length, window, trained) == least
    assert advised_group(length, window, trained) == advised


@given(st.integers(1, 300), st.integers(1, 29), st.integers(2, 30))
@settings(max_examples=200)
def test_no_smaller_group_reaches(length: int, window: int, trained: int) -> None:
    window = min(window, trained - 1)
    group = smallest_group(length, window, trained)
    assert reach(SelfExtend(group, window), trained) >= length
    assert all(reach(SelfExtend(less, window), trained) < length for less in range(1, group))


@given(st.integers(31, 300), st.integers(1, 29), st.integers(2, 30))
@settings(max_examples=200)
def test_the_advised_group_is_the_smallest_that_needs_no_advice(length: int, window: int, trained: int) -> None:
    group = advised_group(length, window, trained)
    if group is None:
        assert 3 * window >= 2 * trained
    else:
        assert advice(SelfExtend(group, window), trained, length) is None
        assert group == smallest_group(length, window, trained) or advice(
            SelfExtend(group - 1, window), trained, length
        )


def test_a_text_too_long_is_refused_with_the_group_that_would_do() -> None:
    config = SelfExtend(group=5, window=1024)
    check_reach(config, trained=4096, length=16_380)
    with pytest.raises(InputTooLong, match=r"16384 tokens .* 16380 .* group 6 would reach it"):
        check_reach(config, trained=4096, length=16_384)


def test_a_window_longer_than_training_reaches_no_farther_than_training() -> None:
    config = SelfExtend(group=8, window=5000)
    check_reach(config, trained=4096, length=4096)
    with pytest.raises(InputTooLong, match="window 2048 with group 2 would reach it"):
        check_reach(config, trained=4096, length=5000)
    with pytest.raises(InputTooLong, match="choose a window shorter than the 4096"):
        smallest_group(5000, 4096, 4096)


def test_distances_the_model_knows_badly_are_told() -> None:
    told = advice(SelfExtend(group=6, window=1024), trained=4096, length=16_384)
    assert told is not None
    assert "two thirds of the 4096" in told
    assert "group 10" in told
    assert advice(SelfExtend(group=10, window=1024), trained=4096, length=16_384) is None
    assert advice(SelfExtend(group=6, window=1024), trained=4096, length=4096) is None  # Nothing is extended.
    assert "a window below 2730" in str(advice(SelfExtend(group=9, window=3000), trained=4096, length=8000))


def test_queries_are_scaled_only_beyond_the_base() -> None:
    positions = torch.tensor([[-3, 0, 98, 99], [100, 199, 999, 9999]])
    assert query_scale(positions, SelfExtend(2, 4)) is None
    log = query_scale(positions, SelfExtend(2, 4, LogitScaling.LOG, scale_base=100))
    yarn = query_scale(positions, SelfExtend(2, 4, LogitScaling.YARN, scale_base=100))
    assert log is not None
    assert yarn is not None
    assert log[0].tolist() == yarn[0].tolist() == [1, 1, 1, 1]
    assert torch.allclose(log[1], torch.tensor([math.log(101) / math.log(100), math.log(200) / math.log(100), 1.5, 2]))
    assert torch.allclose(yarn[1, 3], torch.tensor((0.1 * math.log(100) + 1) ** 2))
    assert log.dtype == torch.float32


def test_scaling_without_a_base_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="scale_base"):
        query_scale(torch.arange(3), SelfExtend(2, 4, LogitScaling.LOG))
