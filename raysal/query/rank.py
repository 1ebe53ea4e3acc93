"""Ranks and hashes: numbers that depend on the pool as a set, or on an image's id alone, never on shards or order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from raysal.errors import InputError


def rank01(x: np.ndarray) -> np.ndarray:
    """Percentile rank R(x) over the pool, ties averaged: (rank - 1) / (n - 1), float64 [n] in [0, 1].

    A pool of one, like a pool of equals, ranks 0.5.

    Raises:
        InputError: A value is NaN, so that it has no rank.
    """
    x = floats(x, "scores")
    if len(x) < 2:
        return np.full(len(x), 0.5)
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return (mean_rank[group.reshape(-1)] - 1) / (len(x) - 1)


def hash01(seed: int, ids: Sequence[str] | np.ndarray, stream: str = "random") -> np.ndarray:
    """A uniform number in (0, 1) for each id, from (seed, stream, id) alone: the same under any sharding. float64 [n]."""
    prefix = f"{stream}:{seed}:".encode()
    digests = b"".join(hashlib.blake2b(prefix + str(i).encode(), digest_size=8).digest() for i in ids)
    return ((np.frombuffer(digests, dtype="<u8") >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53


def floats(x: np.ndarray, what: str) -> np.ndarray:
    """The values as float64 [n]. Raises InputError, calling them `what`, where they are no list or one of them is NaN."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1 or np.isnan(x).any():
        raise InputError(f"{what}: {int(np.isnan(x).sum())} of {x.size} values are NaN; offer only rows of status ok")
    return x
