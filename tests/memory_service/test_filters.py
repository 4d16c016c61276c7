"""Filters as text: what they mean, that they survive writing and reading, and what is said of those that cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_service.errors import InvalidArgument
from memory_service.filters import filter_of, parse, write
from memory_service.types.conditions import AllOf, AnyOf, Compare, Condition, Filter, Not

PY = {"lang": "py", "year": 2021, "score": 0.5, "starred": True, "my field": "a b"}


@pytest.mark.parametrize(
    "text",
    [
        "lang = py",
        "lang == 'py'",
        "lang != c",
        "missing != c",
        "year >= 2020",
        "year > 2020 and year < 2022",
        "year <= 2021.0",
        "score = .5",
        "starred = true",
        "starred = TRUE",
        "starred exists",
        "missing not exists",
        "lang in (c, py)",
        "lang not in (c, rust)",
        "not lang = c",
        "lang = c or lang = py",
        "(lang = c or lang = py) and not (year < 2020)",
        '"my field" = "a b"',
        "true",
        "lang=py AND year>=2020",
    ],
)
def test_a_filter_that_matches(text: str) -> None:
    assert parse(text).matches(PY)


@pytest.mark.parametrize(
    "text",
    [
        "lang = PY",
        "year = '2021'",
        "starred = 1",
        "missing = x",
        "missing < 1",
        "lang < 1",
        "false",
        "lang = c and true",
    ],
)
def test_a_filter_that_does_not_match(text: str) -> None:
    assert not parse(text).matches(PY)


def test_and_binds_tighter_than_or() -> None:
    either = AnyOf((Condition("a", Compare.EQ, (1,)), AllOf((parse("b = 2"), parse("c = 3")))))
    assert parse("a = 1 or b = 2 and c = 3") == either


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "expected the name"),
        ("lang", "expected =, !=, <"),
        ("lang =", "expected a value at lang =⟨here⟩"),
        ("lang = py year", "expected 'and', 'or' or the end at lang = py ⟨here⟩year"),
        ("(lang = py", "expected ')'"),
        ("lang in py", "expected '('"),
        ("lang in ()", "expected a value"),
        ("lang ! py", "no word, number"),
        ("lang = 'py", "no word, number"),
        ("n = 99999999999999999999", "does not fit 64 bits"),
        ("not " * 40 + "a = 1", "may nest"),
        ("a = " + "x" * 20_000, "may have 16384 characters"),
    ],
)
def test_what_is_no_filter_is_refused_with_the_place(text: str, what: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse(text)
    assert what in refused.value.message


def test_filters_may_be_given_as_text_objects_or_several_of_both() -> None:
    py, recent = Condition("lang", Compare.EQ, ("py",)), Condition("year", Compare.GE, (2020,))
    assert filter_of(None) is None
    assert filter_of([]) is None
    assert filter_of("lang = py") == filter_of(["lang = py"]) == filter_of(py) == py
    assert filter_of(["lang = py", recent]) == AllOf((py, recent))


keys = st.text(min_size=1, max_size=8)
scalars = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["and", "true", "12", "1e5", "-", "in", "'", '"', "\\", "nan", "inf"]),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
ordered = [compare for compare in Compare if compare not in (Compare.IN, Compare.EXISTS)]
conditions = st.one_of(
    st.builds(Condition, keys, st.sampled_from(ordered), st.tuples(scalars)),
    st.builds(Condition, keys, st.just(Compare.IN), st.lists(scalars, min_size=1, max_size=3).map(tuple)),
    st.builds(Condition, keys, st.just(Compare.EXISTS)),
)


def _of(parts: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    several = st.lists(parts, max_size=3).filter(lambda found: len(found) != 1).map(tuple)
    return st.one_of(st.builds(AllOf, several), st.builds(AnyOf, several), st.builds(Not, parts))


@given(st.recursive(conditions, _of, max_leaves=6))
def test_a_written_filter_reads_back_as_itself(where: Filter) -> None:
    assert parse(write(where)) == where


WORDS = ["a", "=", "1", "(", ")", "and", "or", "not", "in", ",", "'x'", '"', "\\", "<"]


@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_is_a_filter_or_an_invalid_argument(text: str) -> None:
    try:
        found = parse(text)
    except InvalidArgument:
        return
    assert parse(write(found)).matches({"a": 1}) == found.matches({"a": 1})
