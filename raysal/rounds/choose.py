"""What to ask for: a cold start before any model, then queries on scores. Nothing here can read a label."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from raysal.config import Config
from raysal.datasets.base import Dataset, Item
from raysal.errors import DataError, ImageError
from raysal.query import cold
from raysal.query.scores import needed_columns
from raysal.query.select import offered, room, select, strategy_scores

NOT_SCORES = {"id", "uri", "status", "error", "width", "height", "class_fractions", "embedding", "model_digest", "scored_at"}


def choose(table: pa.Table, bought: Collection[str], cfg: Config, budget: int, groups: Mapping[str, str]) -> list[dict]:
    """Chooses `budget` images from a scores table.

    Args:
        table: Scores (see `raysal.archive.tables.scores_schema`), also of bought images where the batch needs distances to them.
        bought: Ids that have labels; never chosen.
        cfg: Its query section, ueq_alpha and seed decide.
        budget: Images to choose.
        groups: Site and drive by id, for query.group_cap.

    Returns:
        Queue rows without rank and round, first choice first.

    Raises:
        DataError: Fewer readable images are left than the budget.
        InputError: The table lacks a column that the strategy needs.
    """
    ids = table["id"].to_pylist()
    rows = offered(ids, table["status"].to_pylist(), bought)
    enough(len(rows), budget)
    rest = table.take(pa.array(rows))
    rest_ids, uris = rest["id"].to_pylist(), rest["uri"].to_pylist()
    numbers = {name: rest[name].to_numpy() for name in rest.column_names if name not in NOT_SCORES}
    needed = {name: numbers[name] for name in needed_columns(cfg.query.strategy) if name in numbers}
    value = strategy_scores(needed, rest_ids, cfg.query.strategy, cfg.score.ueq_alpha, cfg.seed, budget, cfg.query.cascade_factor)
    spread = cfg.query.batch in ("kcenter", "product")
    if spread and "embedding" not in table.column_names:
        raise DataError(f"query.batch={cfg.query.batch} needs embeddings, but the scores have none; score with score.embedding_dim > 0")
    known = np.flatnonzero(np.isin(ids, list(bought)) & (np.array(table["status"].to_pylist()) == "ok"))
    picked = select(
        rest_ids,
        value,
        budget,
        cfg.query,
        cfg.seed + len(bought),  # `power` draws anew each round: an image out of luck once is not out of luck for ever
        embeddings=embeddings(rest) if spread else None,
        labeled_embeddings=embeddings(table.take(pa.array(known))) if spread and len(known) else None,
        groups=[groups.get(i, "") for i in rest_ids] if cfg.query.group_cap else None,
    )
    return [
        {
            "id": rest_ids[i],
            "uri": uris[i],
            "strategy": cfg.query.strategy,
            "score": float(value[i]),
            "reasons": [(name, float(column[i])) for name, column in numbers.items()],
        }
        for i in picked
    ]


def available(table: pa.Table, bought: Collection[str], cfg: Config, groups: Mapping[str, str]) -> int:
    """How many images of a scores table `choose` can choose at most: readable, not bought, within query.group_cap."""
    ids = table["id"].to_pylist()
    rest = offered(ids, table["status"].to_pylist(), bought)
    return room([groups.get(ids[i], "") for i in rest], cfg.query.group_cap)


def random_start(dataset: Dataset, pool: Sequence[Item], budget: int, seed: int) -> list[dict]:
    """A uniform draw of images that can be read. Raises DataError where too few can."""
    by_id = {item.id: item for item in pool}
    ids = sorted(by_id)
    chosen: list[str] = []
    for i in cold.random_start(ids, len(ids), seed):
        if len(chosen) == budget:
            break
        if _readable(dataset, by_id[ids[i]]):
            chosen.append(ids[i])
    enough(len(chosen), budget)
    return [_first(i, by_id[i].image, "random start") for i in chosen]


def typical_start(embed: Callable[[], pa.Table], budget: int, seed: int) -> list[dict]:
    """One typical image per cluster of encoder features; `embed` gives the scores table with embeddings."""
    table = embed()
    table = table.take(pa.array(offered(table["id"].to_pylist(), table["status"].to_pylist(), ())))
    enough(table.num_rows, budget)
    ids, uris = table["id"].to_pylist(), table["uri"].to_pylist()
    return [_first(ids[i], uris[i], "typical start") for i in cold.typical(embeddings(table), ids, budget, seed)]


def embeddings(table: pa.Table) -> np.ndarray:
    """float32 [n, d] of a table's embedding column."""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)


def enough(have: int, want: int) -> None:
    """Raises DataError where fewer images can be chosen than are wanted."""
    if have < want:
        raise DataError(
            f"{want} images are to be chosen, but only {have} of the pool are left and readable; mend the pool or lower the budget"
        )


def _first(id_: str, uri: str, strategy: str) -> dict:
    return {"id": id_, "uri": uri, "strategy": strategy, "score": None, "reasons": []}


def _readable(dataset: Dataset, item: Item) -> bool:
    try:
        dataset.valid(item, dataset.image(item).shape[:2])
    except ImageError:
        return False
    return True
