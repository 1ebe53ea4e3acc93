"""Scores every image of a pool with both branches: what `raysal.query.select` chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa

from raysal.answers import Scores
from raysal.archive.tables import scores_schema
from raysal.config import Config
from raysal.errors import ConfigError, InputError
from raysal.model.checkpoint import read_info
from raysal.query.scores import score_columns
from raysal.stream.forecast import Forecast, forecast
from raysal.stream.manifest import Manifest
from raysal.stream.pool import Progress, Summary, run_pool
from raysal.stream.worker import Picture, PoolWorker, Row


def score_pool(
    manifest: Manifest,
    checkpoint_uri: str,
    out_uri: str,
    cfg: Config,
    class_bonus: Sequence[float] | np.ndarray | None = None,
    on_progress: Progress | None = None,
    rows_per_shard: int | None = None,
    retry_failed: bool = False,
    replace: bool = False,
) -> Summary:
    """Streams an archive through the model and writes one row of scores an image (`raysal.archive.tables.scores_schema`).

    Few images (`compute.in_process`) are done in this process, more by actors of Ray, which is started where it is not up. Scores
    do not depend on shards, order, batch size or number of actors. No label of the pool can be read: of a manifest only id, uri and the
    exclude masks are.

    Args:
        manifest: A manifest table, or the URI of one.
        checkpoint_uri: The model.
        out_uri: Folder for the shards and ``_SUCCESS``. Images that it holds already are not done again.
        cfg: `score`, the columns that `query.strategy` needs beyond it, `data`'s limits, `compute`.
        class_bonus: omega_C by class id, from `raysal.query.scores.rarity_bonus`; needed where `score.class_bonus` is on.
        on_progress: Called as on_progress(done, total, counts by status) after each block.
        rows_per_shard: Rows of a shard; None chooses.
        retry_failed: Do images again whose row says that they failed.
        replace: Drop rows that another model or configuration left in the folder.

    Returns:
        Rows by status, the checkpoint's digest, and the speed.

    Raises:
        InputError: Manifest, checkpoint, configuration, output folder or cluster can't be used; found before any long work.
        RaysalError: The run broke down.
    """
    cfg, schema = _settle(cfg, checkpoint_uri, class_bonus)
    return run_pool(
        ScoreImages,
        manifest,
        checkpoint_uri,
        out_uri,
        schema=schema,
        cfg=cfg,
        on_progress=on_progress,
        class_bonus=None if class_bonus is None else [float(w) for w in class_bonus],
        rows_per_shard=rows_per_shard,
        retry_failed=retry_failed,
        replace=replace,
    )


def score_forecast(
    manifest: Manifest, checkpoint_uri: str, out_uri: str, cfg: Config, retry_failed: bool = False, replace: bool = False
) -> Forecast:
    """What `score_pool` would do and take; changes nothing. Arguments and errors as there."""
    cfg, schema = _settle(cfg, checkpoint_uri, None)
    return forecast(ScoreImages, manifest, checkpoint_uri, out_uri, schema=schema, cfg=cfg, retry_failed=retry_failed, replace=replace)


def _settle(cfg: Config, checkpoint_uri: str, class_bonus: Sequence[float] | np.ndarray | None) -> tuple[Config, pa.Schema]:
    """The configuration with the columns that a query needs, and the table that they make."""
    if cfg.score.class_bonus and class_bonus is None and cfg.score.scores:  # without scores: for the embeddings alone
        raise ConfigError("score.class_bonus is on, but the labelled images per class are not known here; turn it off or give class_bonus")
    names = score_columns(cfg.score, cfg.query.strategy)
    classes = read_info(checkpoint_uri).label_set
    if class_bonus is not None and len(class_bonus) != (n := classes.n_classes):
        raise InputError(f"class_bonus has {len(class_bonus)} values, the model of {checkpoint_uri} {n} classes; give one a class")
    cfg = cfg.model_copy(update={"score": cfg.score.model_copy(update={"scores": names})})
    return cfg, scores_schema(names, cfg.score.embedding_dim, classes)


class ScoreImages(PoolWorker):
    """Scores, class fractions and an embedding of each image."""

    def start(self) -> None:
        super().start()
        self.scores = Scores(self.predictor, self.cfg.score, self.cfg.seed, self.task.class_bonus)

    def common(self) -> Row:
        return {"model_digest": self.task.model_digest, "scored_at": datetime.now(timezone.utc)}

    def rows(self, pictures: Sequence[Picture]) -> list[Row]:
        return self.scores.of(pictures)
