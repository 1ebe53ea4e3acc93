"""From scores to the batch that experts get.

Everything is a pure function of the set of rows: rows are put in the order of their ids first and ties fall to the smaller
id, so the same pool gives the same batch however it was sharded, shuffled or merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raysal.config import QueryConfig
from raysal.errors import InputError
from raysal.query.rank import floats, hash01, rank01
from raysal.query.scores import needed_columns

FARTHEST = 2.0
"""The greatest cosine distance; the distance to the nearest centre while there is none."""

CENTRES_AT_ONCE = 32
"""Labelled images compared with the pool in one product; bounds memory at pool x 32 floats."""


def strategy_scores(
    table: Mapping[str, np.ndarray],
    ids: Sequence[str] | np.ndarray,
    strategy: str,
    alpha: float = 0.5,
    seed: int = 0,
    budget: int | None = None,
    cascade_factor: int = 4,
) -> np.ndarray:
    """The score by which a strategy orders the pool, higher first.

    Args:
        table: Score columns, one value a row.
        ids: Image ids, one a row.
        strategy: A name of ``query.strategy``.
        alpha: Weight a of ``ueq``: a R(U) + (1 - a) R(E).
        seed: Of ``random``.
        budget: Images wanted; ``ueq_cascade`` needs it.
        cascade_factor: beta of ``ueq_cascade``: the top beta x budget by E go on, then U orders those.

    Returns:
        float64 [n].

    Raises:
        InputError: The strategy is unknown, a column it needs is missing or holds NaN, or a cascade has no budget.
    """
    columns = {name: _column(table, name, len(ids), strategy) for name in needed_columns(strategy)}
    if strategy == "random":
        return hash01(seed, ids)
    if strategy not in ("ueq", "ueq_product", "ueq_cascade"):
        return columns[strategy]
    U, E = columns["uncertainty"], columns["entropy"]
    if strategy == "ueq":
        return alpha * rank01(U) + (1 - alpha) * rank01(E)
    if strategy == "ueq_product":
        return np.sqrt(np.clip(U, 0, None) * np.clip(E, 0, None))
    if budget is None:
        raise InputError("query.strategy=ueq_cascade needs the budget to know how many images go on")
    # Those that go on come first, ordered by U; the rest, reached only through caps, stay ordered by E.
    by_id = np.argsort(np.asarray(ids), kind="stable")
    on = by_id[_ranking(E[by_id])[: cascade_factor * budget]]  # ties to the smaller id, as everywhere
    scores = rank01(E)
    scores[on] = 1 + rank01(U)[on]
    return scores


def offered(ids: Sequence[str] | np.ndarray, statuses: Sequence[str] | np.ndarray, labeled: Collection[str]) -> np.ndarray:
    """Rows that may be asked about: status ok and not labelled yet. int64 [m], in row order."""
    known = set(labeled)
    rows = zip(ids, statuses, strict=True)
    return np.array([n for n, (i, status) in enumerate(rows) if status == "ok" and str(i) not in known], dtype=np.int64)


@dataclass(frozen=True)
class _Pool:
    """A pool in the order of its ids, so that stable sorts leave ties to the smaller id."""

    ids: np.ndarray
    scores: np.ndarray
    cfg: QueryConfig
    seed: int
    groups: np.ndarray | None  # a code per group, -1 where unknown; None: no cap
    embeddings: np.ndarray | None
    labeled: np.ndarray | None


def select(
    ids: Sequence[str] | np.ndarray,
    scores: np.ndarray,
    budget: int,
    cfg: QueryConfig,
    seed: int,
    embeddings: np.ndarray | None = None,
    labeled_embeddings: np.ndarray | None = None,
    groups: Sequence[str] | np.ndarray | None = None,
) -> list[int]:
    """Chooses a batch of images.

    Args:
        ids: Image ids, all different; only rows that may be asked about (see `offered`).
        scores: float [n], higher first.
        budget: How many to choose.
        cfg: ``batch`` (topk, kcenter, product, power) and its knobs, ``group_cap``.
        seed: Of ``power``.
        embeddings: [n, D] of the rows, any float type; kcenter and product need them.
        labeled_embeddings: [m, D] of the images already labelled, the first centres; None or m = 0 where there are none.
        groups: Site and drive of each row, for the cap; images of unknown group ("") are not capped.

    Returns:
        Row numbers in rank order, first choice first.

    Raises:
        InputError: More images are wanted than there are or than the cap lets through, ids repeat, scores are NaN or (product,
            power) negative, or embeddings are missing or of the wrong shape.
    """
    ids, scores = np.asarray(ids), floats(scores, "scores")
    _check(ids, scores, budget, cfg)
    by_id = np.argsort(ids, kind="stable")
    user, diverse = f"query.batch={cfg.batch}", cfg.batch in ("kcenter", "product")
    has_labels = diverse and labeled_embeddings is not None and len(labeled_embeddings) > 0
    pool = _Pool(
        ids=ids[by_id],
        scores=scores[by_id],
        cfg=cfg,
        seed=seed,
        groups=_codes(groups, by_id) if cfg.group_cap else None,
        embeddings=unit_rows(embeddings, len(ids), user)[by_id] if diverse else None,
        labeled=unit_rows(labeled_embeddings, None, user) if has_labels else None,
    )
    if (room := _room(pool, np.arange(len(ids)))) < budget:
        raise InputError(f"query.group_cap={cfg.group_cap} lets {room} of {len(ids)} images through, {budget} are wanted; raise the cap")
    return [int(by_id[i]) for i in BATCHES[cfg.batch](pool, budget)]


def _check(ids: np.ndarray, scores: np.ndarray, budget: int, cfg: QueryConfig) -> None:
    if len(scores) != len(ids):
        raise InputError(f"{len(ids)} ids but {len(scores)} scores; give one score a row")
    if not 0 <= budget <= len(ids):
        raise InputError(f"{budget} images are wanted, but the pool offers {len(ids)}; lower the budget or add images")
    if twice := len(ids) - len(np.unique(ids)):
        raise InputError(f"{twice} of {len(ids)} image ids repeat; index the archive again so that each image is one row")
    if cfg.batch in ("product", "power") and len(scores) and scores.min() < 0:
        raise InputError(f"query.batch={cfg.batch} needs scores of 0 and more, got {scores.min():g}; use topk or kcenter")


def _power(pool: _Pool, budget: int) -> list[int]:
    """Keys log s + Gumbel(0, 1) / T; the top b are drawn without replacement with p ~ s^T (Kirsch et al., 2023)."""
    gumbel = -np.log(-np.log(hash01(pool.seed, pool.ids, "power")))
    with np.errstate(divide="ignore"):
        keys = np.log(pool.scores) + gumbel / pool.cfg.power_temperature
    # Rows of score 0 share the key -inf; by their Gumbel terms they come in random order, not in that of ids.
    return _first(pool, np.lexsort((-gumbel, -keys)), budget)


def _kcenter(pool: _Pool, budget: int) -> list[int]:
    """Furthest first among the best: argmax_i min_j d(i, j) (Sener & Savarese, 2018), over the top candidates by score."""
    order = _ranking(pool.scores)
    n = min(len(order), pool.cfg.candidates_factor * budget)
    while _room(pool, order[:n]) < budget:  # the cap wants more choice
        n = min(len(order), 2 * n)
    return _greedy(pool, order[:n], budget, lambda scores, nearest: nearest)


def _product(pool: _Pool, budget: int) -> list[int]:
    """argmax_i s_i^g min_j d(i, j), greedily over the whole pool."""
    return _greedy(pool, _ranking(pool.scores), budget, lambda scores, nearest: scores**pool.cfg.product_strength * nearest)


BATCHES = {
    "topk": lambda pool, budget: _first(pool, _ranking(pool.scores), budget),
    "kcenter": _kcenter,
    "product": _product,
    "power": _power,
}
"""How a ranking becomes a batch, by ``query.batch``."""


def _first(pool: _Pool, order: np.ndarray, budget: int) -> list[int]:
    """The first rows in order that the cap lets through."""
    chosen: list[int] = []
    taken: Counter[int] = Counter()
    for i in order.tolist():
        if len(chosen) == budget:
            break
        group = -1 if pool.groups is None else int(pool.groups[i])
        if group < 0 or taken[group] < pool.cfg.group_cap:
            taken[group] += 1
            chosen.append(i)
    return chosen


def _greedy(pool: _Pool, candidates: np.ndarray, budget: int, worth: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> list[int]:
    """Takes the candidate of highest worth(score, distance to the nearest centre), makes it a centre, and so on.

    Candidates come in rank order and argmax takes the first of equals: ties fall to the higher score, then to the smaller id.
    """
    assert pool.embeddings is not None
    e_ND, scores = pool.embeddings[candidates], pool.scores[candidates]
    group_N = np.full(len(candidates), -1) if pool.groups is None else pool.groups[candidates]
    nearest_N = np.full(len(candidates), FARTHEST, dtype=np.float32)
    if pool.labeled is not None:
        if pool.labeled.shape[1] != e_ND.shape[1]:
            raise InputError(
                f"embeddings have {e_ND.shape[1]} dimensions, those of labelled images {pool.labeled.shape[1]}; "
                "score both with the same checkpoint and score.embedding_dim"
            )
        for start in range(0, len(pool.labeled), CENTRES_AT_ONCE):
            nearest_N = np.minimum(nearest_N, _distance(e_ND, pool.labeled[start : start + CENTRES_AT_ONCE]).min(1))
    chosen: list[int] = []
    taken: Counter[int] = Counter()
    closed_N = np.zeros(len(candidates), dtype=bool)
    for _ in range(budget):
        i = int(np.argmax(np.where(closed_N, -np.inf, worth(scores, nearest_N))))
        chosen.append(int(candidates[i]))
        closed_N[i] = True
        nearest_N = np.minimum(nearest_N, _distance(e_ND, e_ND[i : i + 1])[:, 0])
        taken[group := int(group_N[i])] += 1
        if group >= 0 and taken[group] >= pool.cfg.group_cap:
            closed_N |= group_N == group
    return chosen


def _room(pool: _Pool, rows: np.ndarray) -> int:
    """How many of these rows the cap lets through."""
    if pool.groups is None:
        return len(rows)
    return _let_through(pool.groups[rows], pool.cfg.group_cap)


def room(groups: Sequence[str], cap: int) -> int:
    """How many images of these groups a cap lets through; 0 is no cap, and images of unknown group ("") are not capped."""
    codes = _codes(groups, np.arange(len(groups)))
    return len(groups) if not cap or codes is None else _let_through(codes, cap)


def _let_through(codes: np.ndarray, cap: int) -> int:
    codes, counts = np.unique(codes, return_counts=True)
    return int(np.where(codes < 0, counts, np.minimum(counts, cap)).sum())


def _ranking(scores: np.ndarray) -> np.ndarray:
    """Rows from the highest score down; a stable sort, so ties stay in the order of ids."""
    return np.argsort(-scores, kind="stable")


def _distance(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Cosine distance of unit vectors: float32 [N, M] in [0, 2]."""
    return np.clip(1 - a_ND @ b_MD.T, 0, FARTHEST)


def unit_rows(embeddings: np.ndarray | None, rows: int | None, user: str) -> np.ndarray:
    """Embeddings [n, D] in float32, L2-normalised.

    Raises:
        InputError: They are missing (the message names their user), not one vector a row, or not finite.
    """
    if embeddings is None:
        raise InputError(f"{user} needs embeddings, and there are none; score with score.embedding_dim above 0")
    e_ND = np.asarray(embeddings, dtype=np.float32)
    if e_ND.ndim != 2 or rows not in (None, len(e_ND)):
        raise InputError(f"{user}: embeddings of shape {e_ND.shape} for {rows} images; give one vector a row")
    if not np.isfinite(e_ND).all():
        raise InputError(f"{user}: embeddings hold NaN or infinity; score the pool again")
    return e_ND / np.maximum(np.linalg.norm(e_ND, axis=1, keepdims=True), 1e-12)


def _codes(groups: Sequence[str] | np.ndarray | None, by_id: np.ndarray) -> np.ndarray | None:
    """A whole number per group, -1 for "" and None, in the order of ids."""
    if groups is None:
        return None
    if len(groups) != len(by_id):
        raise InputError(f"{len(by_id)} images but {len(groups)} groups; give one group a row, empty where unknown")
    codes: dict[str, int] = {}
    return np.array([codes.setdefault(str(g), len(codes)) if g else -1 for g in groups], dtype=np.int64)[by_id]


def _column(table: Mapping[str, np.ndarray], name: str, rows: int, strategy: str) -> np.ndarray:
    if name not in table:
        raise InputError(
            f"query.strategy={strategy} needs the score column {name!r}; score again with it in score.scores (found: {', '.join(table)})"
        )
    column = floats(table[name], f"score column {name!r}")
    if len(column) != rows:
        raise InputError(f"score column {name!r} has {len(column)} values for {rows} images")
    return column
