"""Which rows read which: the authors' formula, the paper's small models, and recipes of our own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_service.errors import InvalidArgument
from model_worker.training.reads import grouped, packed, previous, released


def counts(reads: tuple[tuple[int, ...], ...]) -> list[int]:
    return [len(others) for others in reads]


def test_a_row_reads_the_rows_just_before_it() -> None:
    assert released(4, 2) == ((), (0,), (1, 0), (2, 1))


@pytest.mark.parametrize(
    ("cross_batch_range", "packing", "contexts"),
    [(3, 4, [0, 1, 2, 3, 0, 2, 3, 3]), (6, 4, [0, 1, 2, 3, 0, 3, 6, 6]), (5, 2, [0, 1, 0, 3, 0, 5])],
)
def test_stepping_gives_the_first_window_none_and_the_last_all(
    cross_batch_range: int, packing: int, contexts: list[int]
) -> None:
    assert counts(released(len(contexts), cross_batch_range, packing, stepping=True)) == contexts


def test_a_range_of_zero_is_plain_training() -> None:
    assert released(3, 0, 2, stepping=True) == ((), (), ())


def test_longllama_3b_by_positives_and_negatives_is_the_formula() -> None:
    assert packed(12, (0, 1, 2, 3), (0, 1, 1, 0)) == released(12, 3, 4, stepping=True)


def test_longllama_7b_which_the_formula_cannot_reach() -> None:
    reads = packed(12, (0, 1, 2, 3), (0, 2, 5, 4))
    assert counts(reads)[8:] == [0, 3, 7, 7]
    assert reads[11] == (10, 9, 8, 7, 6, 5, 4)
    assert counts(reads)[:4] == [0, 1, 2, 3]  # Nothing stands before the first document.


def test_around_the_batch_every_document_has_its_negatives() -> None:
    reads = packed(12, (0, 1, 2, 3), (0, 2, 5, 4), around=True)
    assert counts(reads) == [0, 3, 7, 7] * 3
    assert reads[1] == (0, 11, 10)


def test_a_current_context_reads_its_own_previous_one_and_those_of_the_next_documents() -> None:
    assert previous(3, 2) == ((), (), (), (0, 1), (1, 2), (2, 0))


def test_the_last_window_of_a_document_reads_the_earlier_ones_of_its_group() -> None:
    assert grouped(4, 2, 2) == ((), (0, 2), (), (0, 2), (), (4, 6), (), (4, 6))
    assert grouped(1, 3, 1) == ((), (), (0, 1))
    assert grouped(3, 1, 3) == ((), (), ())


@settings(max_examples=40)
@given(
    documents=st.integers(1, 6),
    packing=st.integers(1, 5),
    cross_batch_range=st.integers(0, 40),
    stepping=st.booleans(),
    d=st.integers(0, 6),
)
def test_nobody_reads_itself_or_a_row_that_is_not_there_or_one_twice(
    documents: int, packing: int, cross_batch_range: int, stepping: bool, d: int
) -> None:
    rows = documents * packing
    for reads in (
        released(rows, cross_batch_range, packing, stepping),
        previous(documents, min(d, documents)),
        grouped(documents, packing, documents),
        packed(rows, range(packing), [min(d, rows - packing)] * packing, around=stepping),
    ):
        for row, others in enumerate(reads):
            assert row not in others
            assert len(set(others)) == len(others)
            assert all(0 <= other < len(reads) for other in others)


@pytest.mark.parametrize(
    "make",
    [
        lambda: released(0, 1),
        lambda: released(4, -1),
        lambda: released(4, 1, packing=0),
        lambda: packed(4, (), ()),
        lambda: packed(5, (0, 1), (0, 1)),
        lambda: packed(4, (0, 1), (0,)),
        lambda: packed(4, (1, 1), (0, 0)),
        lambda: packed(4, (0, 1), (0, 3)),
        lambda: previous(2, 3),
        lambda: grouped(4, 2, 3),
        lambda: grouped(4, 0, 2),
    ],
)
def test_recipes_that_do_not_fit_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument):
        make()
