"""A batch is a function of the pool as a set: never of row order, shards or machine; and it honours cap, labels and budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import rankdata

from raysal.config import QueryConfig
from raysal.errors import InputError
from raysal.query.rank import hash01, rank01
from raysal.query.select import offered, select, strategy_scores

BATCHES = ("topk", "kcenter", "product", "power")
calm = settings(deadline=None, max_examples=50)  # a busy machine is no failure
STRATEGIES = ("random", "entropy", "uncertainty", "ueq", "ueq_product", "ueq_cascade")


def pool(n: int, seed: int = 0, dim: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "ids": np.array([f"{i:032x}" for i in rng.permutation(10 * n)[:n]]),
        "entropy": rng.random(n).round(2),  # rounded: ties are the hard case
        "uncertainty": rng.random(n).round(2),
        "embeddings": rng.normal(size=(n, dim)).astype(np.float16),
        "groups": np.array([f"site{g}" if g else "" for g in rng.integers(0, 5, n)]),
    }


def shuffled(rows: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(rows["ids"]))
    return {name: column[order] for name, column in rows.items()}


def batch_of(rows: dict[str, np.ndarray], cfg: QueryConfig, budget: int, seed: int = 3) -> list[str]:
    s = strategy_scores(rows, rows["ids"], cfg.strategy, seed=seed, budget=budget, cascade_factor=cfg.cascade_factor)
    chosen = select(rows["ids"], s, budget, cfg, seed, rows["embeddings"], pool(4, 9)["embeddings"], rows["groups"])
    return [str(rows["ids"][i]) for i in chosen]


@calm
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=60))
def test_rank01_is_the_average_percentile_rank(x: list[float]) -> None:
    expected = (rankdata(x, method="average") - 1) / (len(x) - 1)
    np.testing.assert_allclose(rank01(np.array(x)), expected, atol=1e-12)


def test_rank01_of_few_or_equal_values_is_one_half() -> None:
    assert rank01(np.array([])).shape == (0,)
    assert rank01(np.array([7.0])).tolist() == [0.5]
    assert rank01(np.array([7.0, 7.0, 7.0])).tolist() == [0.5] * 3
    with pytest.raises(InputError, match="NaN"):
        rank01(np.array([1.0, np.nan]))


@calm
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_rank01_does_not_change_under_monotone_recalibration(x: list[float]) -> None:
    distinct = np.unique(np.round(x, 6))
    np.testing.assert_array_equal(rank01(distinct), rank01(np.exp(3 * distinct)))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cap", [0, 3])
def test_row_order_does_not_change_the_batch(batch: str, strategy: str, cap: int) -> None:
    cfg = QueryConfig(strategy=strategy, batch=batch, group_cap=cap)  # type: ignore[arg-type]
    rows = pool(90)
    expected = batch_of(rows, cfg, 10)
    assert len(set(expected)) == 10
    for seed in range(3):
        assert batch_of(shuffled(rows, seed), cfg, 10) == expected


@pytest.mark.parametrize("batch", ["topk", "power"])
@pytest.mark.parametrize("shards", [1, 3, 7])
def test_the_best_of_all_shards_are_the_best_of_the_whole(batch: str, shards: int) -> None:
    cfg = QueryConfig(batch=batch)  # type: ignore[arg-type]
    rows = pool(100)
    ids, s = rows["ids"], rows["entropy"]
    whole = [ids[i] for i in select(ids, s, 12, cfg, 5)]
    survivors = np.concatenate([part[select(ids[part], s[part], 12, cfg, 5)] for part in np.array_split(np.arange(100), shards)])
    assert [ids[survivors][i] for i in select(ids[survivors], s[survivors], 12, cfg, 5)] == whole


@pytest.mark.parametrize("batch", BATCHES)
def test_the_same_seed_gives_the_same_batch(batch: str) -> None:
    cfg = QueryConfig(strategy="random", batch=batch, candidates_factor=2)  # type: ignore[arg-type]
    rows = pool(60)
    assert batch_of(rows, cfg, 8, seed=1) == batch_of(rows, cfg, 8, seed=1)
    assert batch_of(rows, cfg, 8, seed=1) != batch_of(rows, cfg, 8, seed=2)


@calm
@given(st.sets(st.integers(0, 39), max_size=30), st.sampled_from(BATCHES))
def test_a_labelled_id_is_never_chosen(labeled: set[int], batch: str) -> None:
    rows = pool(40)
    ids = rows["ids"]
    statuses = np.where(np.arange(40) % 7 == 3, "decode", "ok")
    known = {str(ids[i]) for i in labeled}
    free = offered(ids, statuses, known)
    budget = min(5, len(free))
    cfg = QueryConfig(batch=batch)  # type: ignore[arg-type]
    chosen = select(ids[free], rows["entropy"][free], budget, cfg, 0, rows["embeddings"][free])
    names = {str(ids[free][i]) for i in chosen}
    assert len(names) == budget
    assert not names & known
    assert all(statuses[free[i]] == "ok" for i in chosen)


def test_topk_is_by_score_and_ties_fall_to_the_smaller_id() -> None:
    ids = np.array(["d", "a", "c", "b"])
    assert select(ids, np.array([1.0, 0.5, 1.0, 2.0]), 4, QueryConfig(), 0) == [3, 2, 0, 1]


@pytest.mark.parametrize("batch", BATCHES)
def test_the_cap_bounds_every_known_group_and_no_unknown_one(batch: str) -> None:
    rows = pool(80)
    rows["groups"] = np.where(np.arange(80) < 50, "same", np.where(np.arange(80) < 55, "", "other"))
    rows["entropy"] = np.linspace(1, 0.1, 80)
    cfg = QueryConfig(batch=batch, group_cap=2, candidates_factor=1)  # type: ignore[arg-type]
    chosen = select(rows["ids"], rows["entropy"], 9, cfg, 0, rows["embeddings"], groups=rows["groups"])
    taken = rows["groups"][chosen].tolist()
    assert (taken.count("same"), taken.count("other"), taken.count("")) == (2, 2, 5)
    with pytest.raises(InputError, match="lets 9 of 80 images through, 10 are wanted"):
        select(rows["ids"], rows["entropy"], 10, cfg, 0, rows["embeddings"], groups=rows["groups"])


def test_kcenter_is_furthest_first_from_labelled_images_among_the_best() -> None:
    ids = np.array(list("abcdef"))
    angles = np.radians([0, 2, 90, 120, 180, 270])
    e = np.stack([np.cos(angles), np.sin(angles)], 1)
    s = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.1])
    cfg = QueryConfig(batch="kcenter", candidates_factor=2)
    labeled = np.array([[5.0, 0.0]])  # at 0 degrees, not normalised
    assert select(ids, s, 2, cfg, 0, e, labeled) == [3, 2]  # of a..d: 120 degrees is furthest from 0, then 90
    assert select(ids, s, 3, cfg, 0, e, labeled) == [4, 2, 5]  # of all: 180, then 90 and 270 tie and the better score goes first
    assert select(ids, s, 2, cfg, 0, e) == [0, 3]  # nothing labelled: the best score first


def test_product_equals_its_equation() -> None:
    rows = pool(50)
    e = rows["embeddings"].astype(np.float64)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    s, centres, expected = rows["entropy"], [e[7], e[30]], []
    for _ in range(6):
        worth = s**2 * np.min([1 - e @ c for c in centres], axis=0)
        worth[expected] = -1
        expected.append(int(worth.argmax()))
        centres.append(e[expected[-1]])
    cfg = QueryConfig(batch="product", product_strength=2)
    assert select(rows["ids"], s, 6, cfg, 0, rows["embeddings"], rows["embeddings"][[7, 30]]) == expected


def test_product_and_kcenter_avoid_copies_of_what_is_chosen() -> None:
    rows = pool(30)
    e = np.concatenate([rows["embeddings"], rows["embeddings"]])
    ids = np.array([f"{i:03d}" for i in range(60)])
    s = np.concatenate([rows["entropy"], rows["entropy"]]) + 0.1
    for batch in ("kcenter", "product"):
        chosen = select(ids, s, 20, QueryConfig(batch=batch), 0, e)  # type: ignore[arg-type]
        assert len({i % 30 for i in chosen}) == 20


def test_power_draws_in_proportion_to_the_score() -> None:
    ids, s = np.array(["a", "b", "c"]), np.array([0.6, 0.3, 0.1])
    for temperature in (1.0, 2.0):
        cfg = QueryConfig(batch="power", power_temperature=temperature)
        first = np.bincount([select(ids, s, 1, cfg, seed)[0] for seed in range(4000)], minlength=3) / 4000
        np.testing.assert_allclose(first, s**temperature / (s**temperature).sum(), atol=0.03)


def test_power_takes_images_of_score_0_last() -> None:
    ids, s = np.array(["a", "b", "c", "d"]), np.array([0.0, 1e-9, 0.0, 1.0])
    for seed in range(20):
        assert set(select(ids, s, 2, QueryConfig(batch="power"), seed)) == {1, 3}


def test_random_scores_are_uniform_and_follow_the_id_alone() -> None:
    ids = pool(4000)["ids"]
    u = strategy_scores({}, ids, "random", seed=4)
    assert u.min() > 0
    assert u.max() < 1
    np.testing.assert_allclose(np.histogram(u, 10, (0, 1))[0], 400, atol=80)
    np.testing.assert_array_equal(u[100:200], hash01(4, ids[100:200]))
    assert not np.array_equal(u, hash01(5, ids))


def test_ueq_is_the_mean_of_percentile_ranks_over_the_whole_pool() -> None:
    rows = pool(50)
    n = len(rows["ids"]) - 1
    expected = 0.3 * (rankdata(rows["uncertainty"]) - 1) / n + 0.7 * (rankdata(rows["entropy"]) - 1) / n
    np.testing.assert_allclose(strategy_scores(rows, rows["ids"], "ueq", alpha=0.3), expected)
    product = np.sqrt(rows["uncertainty"] * rows["entropy"])
    np.testing.assert_allclose(strategy_scores(rows, rows["ids"], "ueq_product"), product)


def test_the_cascade_keeps_the_top_by_entropy_and_orders_them_by_uncertainty() -> None:
    rows = pool(60)
    budget, beta = 5, 4
    s = strategy_scores(rows, rows["ids"], "ueq_cascade", budget=budget, cascade_factor=beta)
    by_entropy = np.lexsort((rows["ids"], -rows["entropy"]))[: beta * budget]
    expected = by_entropy[np.lexsort((rows["ids"][by_entropy], -rows["uncertainty"][by_entropy]))][:budget]
    assert select(rows["ids"], s, budget, QueryConfig(), 0) == expected.tolist()
    with pytest.raises(InputError, match="budget"):
        strategy_scores(rows, rows["ids"], "ueq_cascade")


def test_input_that_cannot_be_used_is_refused_with_its_numbers() -> None:
    ids, s, e = np.array(["a", "b", "c"]), np.array([0.1, 0.2, 0.3]), np.eye(3)
    with pytest.raises(InputError, match="4 images are wanted, but the pool offers 3"):
        select(ids, s, 4, QueryConfig(), 0)
    with pytest.raises(InputError, match="1 of 3 image ids repeat"):
        select(np.array(["a", "b", "a"]), s, 1, QueryConfig(), 0)
    with pytest.raises(InputError, match="3 ids but 2 scores"):
        select(ids, s[:2], 1, QueryConfig(), 0)
    with pytest.raises(InputError, match="1 of 3 values are NaN"):
        select(ids, np.array([0.1, np.nan, 0.3]), 1, QueryConfig(), 0)
    with pytest.raises(InputError, match=r"got -0\.1"):
        select(ids, s - 0.2, 1, QueryConfig(batch="power"), 0)
    with pytest.raises(InputError, match="embedding_dim"):
        select(ids, s, 1, QueryConfig(batch="kcenter"), 0)
    with pytest.raises(InputError, match=r"\(2, 3\) for 3 images"):
        select(ids, s, 1, QueryConfig(batch="product"), 0, e[:2])
    with pytest.raises(InputError, match="3 dimensions, those of labelled images 2"):
        select(ids, s, 1, QueryConfig(batch="product"), 0, e, np.eye(2))
    with pytest.raises(InputError, match="needs the score column 'uncertainty'"):
        strategy_scores({"entropy": s}, ids, "ueq")
    assert select(ids, s, 0, QueryConfig(), 0) == []
