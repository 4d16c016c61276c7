"""k-means on distinct rows."""

from __future__ import annotations

import numpy as np
import pytest

from memory_service.errors import Cancelled
from memory_service.index.clustering import Floats, Ints, distinct, outlier_reach, train_centroids
from memory_service.types.callers import Cancel


def nearest(centroids: Floats, rows: Floats) -> tuple[Floats, Ints]:
    distances = np.square(rows[:, None] - centroids[None]).sum(2)
    return distances.min(1), distances.argmin(1).astype(np.int64)


def test_repeated_rows_are_kept_once() -> None:
    rows = np.array([[1, 2], [3, 4], [1, 2], [1, 2]], np.float32)
    assert sorted(distinct(rows).tolist()) == [[1, 2], [3, 4]]


def test_centroids_settle_on_the_middle_of_each_group() -> None:
    rows = np.array([[0, 0], [0, 2], [10, 10], [10, 12]], np.float32)
    centroids = train_centroids(rows, 2, nearest, 0, Cancel())
    assert sorted(centroids.tolist()) == [[0, 1], [10, 11]]


def test_an_empty_list_moves_to_the_worst_served_row() -> None:
    rows = np.array([[0.0], [0.1], [0.2], [50.0]], np.float32)

    def lazy(centroids: Floats, asked: Floats) -> tuple[Floats, Ints]:
        """Gives every row to the first centroid."""
        return np.square(asked - centroids[0]).sum(1), np.zeros(len(asked), np.int64)

    assert [50.0] in train_centroids(rows, 2, lazy, 0, Cancel()).tolist()


def test_a_cancelled_training_stops() -> None:
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(Cancelled):
        train_centroids(np.eye(4, dtype=np.float32), 2, nearest, 0, cancel)


def test_outliers_are_the_asked_share_and_never_rounding_noise() -> None:
    rows = np.ones((100, 4), np.float32)
    far = np.arange(100, dtype=np.float32)
    assert (far > outlier_reach(rows, far, 0.05)).sum() == 5
    assert outlier_reach(rows, np.full(100, 1e-6, np.float32), 0.05) > 1e-6
