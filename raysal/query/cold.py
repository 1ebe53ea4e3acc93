"""Which images to label first, while there is no model: spread over the archive, or at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from raysal.errors import InputError
from raysal.query.rank import hash01
from raysal.query.select import unit_rows

NEIGHBOURS = 20
"""k of typicality, as in TypiClust."""

MINI_BATCH_ABOVE = 20_000
"""Pools above this are clustered by mini-batches: close to full k-means and far cheaper."""


def random_start(ids: Sequence[str] | np.ndarray, budget: int, seed: int) -> list[int]:
    """A uniform draw without replacement, by hash(seed, id): the same for any order of rows.

    Returns:
        Row numbers, first choice first.

    Raises:
        InputError: More images are wanted than there are.
    """
    _check(len(ids), budget)
    ids = np.asarray(ids)
    return [int(i) for i in np.lexsort((ids, hash01(seed, ids, "start")))[:budget]]


def typical(embeddings: np.ndarray, ids: Sequence[str] | np.ndarray, budget: int, seed: int) -> list[int]:
    """One typical image per cluster of embeddings (TypiClust: Hacohen, Dekel and Weinshall, 2022, arXiv 2202.02794).

    The pool is split into ``budget`` clusters by k-means; of each, the largest first, comes the image of highest typicality,
    1 / (mean distance to its 20 nearest neighbours inside the cluster). Where an archive has fewer different images than the
    budget, clusters are empty and further typical images of the largest ones fill up.

    Args:
        embeddings: [n, D], any float type; compared by direction alone.
        ids: Image ids, one a row.
        budget: How many to choose.
        seed: Of k-means.

    Returns:
        Row numbers, the largest cluster's first; independent of the order of rows.

    Raises:
        InputError: More images are wanted than there are, or embeddings are not one finite vector a row.
    """
    _check(len(ids), budget)
    if budget == 0:
        return []
    by_id = np.argsort(np.asarray(ids), kind="stable")
    e_ND = unit_rows(embeddings, len(by_id), "loop.cold_start=typical")[by_id]
    clusters = sorted(_clusters(e_ND, budget, seed), key=lambda rows: (-len(rows), rows[0]))
    with threadpool_limits(1):
        queues = [rows[np.argsort(-_typicality(e_ND[rows]), kind="stable")] for rows in clusters]
    # Each cluster gives its most typical image, then each its second, until the budget is met.
    depth = max(len(rows) for rows in queues)
    turns = [int(by_id[rows[turn]]) for turn in range(depth) for rows in queues if turn < len(rows)]
    return turns[:budget]


def _clusters(e_ND: np.ndarray, budget: int, seed: int) -> list[np.ndarray]:
    """Rows of each cluster, empty ones left out. One thread: the order of a parallel sum would depend on the machine."""
    distinct = len(np.unique(e_ND, axis=0))
    kind = MiniBatchKMeans if len(e_ND) > MINI_BATCH_ABOVE else KMeans
    with threadpool_limits(1):
        found = kind(n_clusters=min(budget, distinct), n_init=3, random_state=seed % 2**32).fit_predict(e_ND)
    return [rows for k in range(budget) if len(rows := np.flatnonzero(found == k))]


def _typicality(e_ND: np.ndarray) -> np.ndarray:
    """1 / mean distance to the k nearest others in the cluster: float64 [N]; a cluster of one is as typical as can be."""
    if len(e_ND) == 1:
        return np.ones(1)
    k = min(NEIGHBOURS, len(e_ND) - 1)
    distances = NearestNeighbors(n_neighbors=k).fit(e_ND).kneighbors()[0]  # without an argument, a row is not its own neighbour
    return 1 / np.maximum(distances.mean(1), 1e-12)


def _check(rows: int, budget: int) -> None:
    if not 0 <= budget <= rows:
        raise InputError(f"{budget} images are wanted to start with, but the pool has {rows}; lower loop.initial or add images")
