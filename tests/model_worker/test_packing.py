"""Documents become windows without losing or inventing a token, each row going on with its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_service.errors import InvalidArgument
from model_worker.training.packing import Document, Windows, packed, packing_of


def numbered(*lengths: int, source: str = "") -> list[Document]:
    """Document d of n tokens is 100 d, 100 d + 1, …; its first token is not scored."""
    return [
        Document(range(100 * number, 100 * number + length), [0.0] + [1.0] * (length - 1), source)
        for number, length in enumerate(lengths, start=1)
    ]


def rows_of(batches: list[Windows]) -> list[list[int]]:
    """What each row gave out over all batches."""
    return [torch.cat([batch.ids[row] for batch in batches]).tolist() for row in range(len(batches[0].ids))]


def test_a_row_goes_on_with_its_document_and_then_takes_the_next() -> None:
    batches = list(packed(numbered(7, 4, 4), rows=2, length=3))
    assert [batch.ids.tolist() for batch in batches] == [
        [[100, 101, 102], [200, 201, 202]],
        [[103, 104, 105], [203, 300, 301]],
    ]
    assert [batch.targets.tolist() for batch in batches] == [
        [[101, 102, 103], [201, 202, 203]],
        [[104, 105, 106], [300, 301, 302]],
    ]
    assert [batch.weights.tolist() for batch in batches] == [[[1, 1, 1], [1, 1, 1]], [[1, 1, 1], [0, 1, 1]]]


def test_packing_lays_consecutive_windows_of_a_document_side_by_side() -> None:
    (batch,) = packed(numbered(7, 7), rows=4, length=3, packing=2)
    assert batch.ids.tolist() == [[100, 101, 102], [103, 104, 105], [200, 201, 202], [203, 204, 205]]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=12), length=st.integers(1, 7), documents=st.integers(1, 3))
def test_no_token_is_lost_or_invented(lengths: list[int], length: int, documents: int) -> None:
    sources = numbered(*lengths)
    known = {tuple(one.tokens) for one in sources}
    batches = list(packed(iter(sources), rows=documents * 2, length=length, packing=2))
    for batch in batches:
        ids, targets = batch.ids.view(documents, -1), batch.targets.view(documents, -1)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        assert batch.tokens % batch.ids.numel() == 0
    for row in range(documents) if batches else ():
        given_out = torch.cat([batch.ids.view(documents, -1)[row] for batch in batches]).tolist()
        starts = [place for place, token in enumerate(given_out) if token % 100 == 0]
        whole = [tuple(given_out[start:stop]) for start, stop in pairwise(starts)]
        assert starts[0] == 0
        assert set(whole) <= known


def test_linear_fills_a_batch_with_one_document_after_the_other() -> None:
    batches = list(packed(numbered(5, 5), rows=2, length=2, packing=packing_of("linear", 2)))
    assert [batch.ids.tolist() for batch in batches] == [[[100, 101], [102, 103]], [[104, 200], [201, 202]]]


def test_padding_ends_a_row_with_its_document() -> None:
    batches = list(packed(numbered(5, 4, 3), rows=1, length=3, pad=True, pad_token=9))
    assert rows_of(batches) == [[100, 101, 102, 103, 104, 9, 200, 201, 202, 203, 9, 9]]
    weights = torch.cat([batch.weights[0] for batch in batches]).tolist()
    assert weights == [1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]


def test_padding_writes_into_nobodys_document() -> None:
    document = Document([5, 6], [1.0, 1.0])
    list(packed([document, document], rows=1, length=3, pad=True))
    assert (document.tokens, document.weights) == ([5, 6], [1.0, 1.0])


def test_short_documents_are_skipped() -> None:
    (batch,) = packed(numbered(2, 4, 1, 4), rows=2, length=3, min_example_length=3)
    assert batch.ids.tolist() == [[200, 201, 202], [400, 401, 402]]
    assert batch.documents == 2


def test_a_batch_tells_what_its_tokens_are_of() -> None:
    web, book = numbered(4, source="web"), numbered(8, source="book")
    first, second = islice(packed([*web, *book, *web], rows=1, length=6), 2)
    assert (first.sources, first.documents, first.tokens) == ({"web": 4, "book": 2}, 2, 6)
    assert (second.sources, second.documents, second.tokens) == ({"book": 6}, 3, 12)  # The third gives a target.


def test_no_more_documents_are_taken_than_a_batch_needs() -> None:
    taken = 0

    def endless() -> Iterator[Document]:
        nonlocal taken
        for number in count():
            taken += 1
            yield Document([number] * 4, [1.0] * 4)

    next(packed(endless(), rows=2, length=3))
    assert taken == 2


def test_a_text_gets_its_ends() -> None:
    assert Document.of([7, 8], 1, 2, "web") == Document([1, 7, 8, 2], [0.0, 1.0, 1.0, 1.0], "web")
    assert Document.of([7], None, None) == Document([7], [1.0])


@pytest.mark.parametrize(
    ("name", "packing"), [("linear", 8), ("doc_aware", 1), ("doc_aware_k1", 1), ("doc_aware_k4", 4)]
)
def test_pipelines_have_the_authors_names(name: str, packing: int) -> None:
    assert packing_of(name, 8) == packing


@pytest.mark.parametrize("name", ["doc_aware_k0", "doc_aware_k", "packed", "linear_k2"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="doc_aware"):
        packing_of(name, 8)


def test_sizes_that_do_not_fit_are_refused_before_a_document_is_taken() -> None:
    for rows, length, packing in ((0, 3, 1), (4, 0, 1), (4, 3, 3), (4, 3, 0)):
        with pytest.raises(InvalidArgument, match="packing"):
            packed([], rows, length, packing=packing)


def test_a_document_with_too_few_weights_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="weight"):
        next(packed([Document([1, 2, 3], [1.0])], rows=1, length=2))
