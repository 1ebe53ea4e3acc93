"""The first labels, bought without a model, are spread over what the archive holds and repeatable."""

from __future__ import annotations

import numpy as np
import pytest

from raysal.errors import InputError
from raysal.query.cold import random_start, typical


def blobs(sizes: list[int], seed: int = 0, spread: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings around one axis each, ids, and which blob a row is of."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(sizes)), sizes)
    e = np.eye(16)[of] + spread * rng.normal(size=(len(of), 16))
    return e.astype(np.float16), np.array([f"{i:04x}" for i in rng.permutation(len(of))]), of


def test_every_cluster_gives_one_image_and_the_largest_comes_first() -> None:
    e, ids, of = blobs([40, 5, 20, 10])
    assert of[typical(e, ids, 4, 0)].tolist() == [0, 2, 3, 1]


def test_the_image_is_typical_of_its_cluster() -> None:
    e, ids, of = blobs([60, 60], spread=0.2)
    unit = e.astype(np.float64) / np.linalg.norm(e.astype(np.float64), axis=1, keepdims=True)
    for i in typical(e, ids, 2, 0):
        mates = unit[of == of[i]]
        mean_distance = np.array([np.sort(np.linalg.norm(mates - m, axis=1))[1:21].mean() for m in mates])
        assert np.linalg.norm(unit[i] - mates[mean_distance.argmin()]) < 1e-6


def test_row_order_does_not_change_the_start() -> None:
    e, ids, _ = blobs([30, 20, 9], spread=0.3)
    chosen = [ids[i] for i in typical(e, ids, 7, 1)]
    drawn = [ids[i] for i in random_start(ids, 7, 1)]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(ids))
        assert [ids[order][i] for i in typical(e[order], ids[order], 7, 1)] == chosen
        assert [ids[order][i] for i in random_start(ids[order], 7, 1)] == drawn
    assert random_start(ids, 7, 1) != random_start(ids, 7, 2)


def test_an_archive_of_copies_still_fills_the_budget() -> None:
    e, ids, _ = blobs([6, 3], spread=0.0)
    chosen = typical(e, ids, 5, 0)
    assert len(set(chosen)) == 5
    assert sorted(typical(e, ids, 9, 0)) == list(range(9))


def test_a_budget_over_the_pool_is_refused() -> None:
    e, ids, _ = blobs([4])
    with pytest.raises(InputError, match="5 images are wanted to start with, but the pool has 4"):
        typical(e, ids, 5, 0)
    with pytest.raises(InputError, match="pool has 4"):
        random_start(ids, 5, 0)
    assert typical(e, ids, 0, 0) == []
