"""A window that was seen before is not computed again, and nobody can tell from what is stored."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model_worker.decoder import loading
from model_worker.decoder.repeats import Repeats
from model_worker.hf.lean import Lean
from tests.model_worker.test_lean import FOT, attached, check_same, made, ordinarily, pieces_of, stored
from tests.model_worker.texts import text

pytestmark = pytest.mark.usefixtures("_short_texts_are_long_enough")
ALL = 1 << 20


@pytest.fixture
def _short_texts_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_worker.hf.lean._LEAST_TOKENS", 1)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows each pass computes."""
    found: list[int] = []
    fill = Lean.fill

    def counted(self: Lean, ids: Tensor, known: int, room: object) -> tuple[Tensor, Tensor]:
        found.append(len(ids))
        return fill(self, ids, known, room)  # type: ignore[arg-type]

    monkeypatch.setattr(Lean, "fill", counted)
    return found


def haystack(sentence: int, times: int, needle: int | None = None) -> Tensor:
    """A sentence of so many tokens over and over, with a token in it that stands nowhere else."""
    ids = text(sentence).repeat(times)
    if needle is not None:
        ids[needle] = 90
    return ids


def origins(*texts: Sequence[int], window: int = 2, reach: int = ALL) -> list[int]:
    windows = [tuple(ids[at : at + window]) for ids in texts for at in range(0, len(ids), window)]
    return Repeats(windows, reach).origins


# --- Which windows are the same -------------------------------------------------------------------------------------


def test_a_window_is_that_of_the_first_one_with_its_tokens() -> None:
    assert origins([1, 2, 3, 4, 1, 2, 1, 2, 3]) == [0, 1, 0, 0, 4]


def test_windows_of_different_texts_are_the_same_windows() -> None:
    assert origins([1, 2, 3, 4], [3, 4, 1, 2]) == [0, 1, 1, 0]


def test_the_beginning_of_a_longer_window_is_another_window() -> None:
    assert origins([1, 2], [1]) == [0, 1]


def test_a_window_not_seen_for_long_is_computed_again() -> None:
    assert origins([1, 1, 2, 2, 1, 1, 3, 3, 2, 2, 1, 1], reach=2) == [0, 1, 0, 3, 4, 5]


def test_nothing_is_remembered_with_no_reach() -> None:
    assert origins([1, 1, 1, 1, 1, 1], reach=0) == [0, 1, 2]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 5))
def test_an_origin_comes_first_has_the_same_tokens_and_knows_its_last_use(tokens: list[int], reach: int) -> None:
    found = Repeats(tokens, reach)
    for number, origin in enumerate(found.origins):
        assert origin <= number <= found.last(origin)
        assert found.origins[origin] == origin
        assert tokens[number] == tokens[origin]
    for origin in found.firsts:
        assert found.origins[found.last(origin)] == origin


# --- What is stored -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0, 7])
@pytest.mark.parametrize("remembered", [0, 100, ALL])
def test_repeated_text_is_stored_as_if_every_window_had_been_computed(
    overlap: int, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_REMEMBERED", remembered)
    texts = [haystack(10, 60, needle=301), text(77, seed=3), haystack(10, 33), haystack(1, 50)]
    with attached(made()) as decoder:
        have, want = (how(decoder, texts, FOT, overlap) for how in (stored, ordinarily))
    check_same(have, want)
    assert have.order == want.order == pieces_of(texts, FOT, overlap)


@torch.no_grad()
def test_only_windows_that_differ_are_computed(computed: list[int]) -> None:
    texts = [haystack(8, 60, needle=241)]  # Three sentences to a window of 24: 20 windows.
    with attached(made()) as decoder:
        stored(decoder, texts)
        assert sum(computed) == 2 + 2  # The sentence thrice, the needle's; and the trial of the pass, two rows.


@torch.no_grad()
def test_text_without_repeats_is_computed_whole(computed: list[int]) -> None:
    with attached(made()) as decoder:
        stored(decoder, [text(24 * 6, seed=9)])
        assert sum(computed) == 6 + 2
