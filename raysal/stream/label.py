"""Labels every image of an archive: a mask, how sure it is, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import raysal
from raysal.answers import Masks, reliability
from raysal.archive.tables import labels_schema
from raysal.archive.uris import join, read_record, write_bytes
from raysal.config import Config
from raysal.images.masks import encode_mask
from raysal.model.checkpoint import ModelInfo, read_info
from raysal.stream.forecast import Forecast, forecast
from raysal.stream.manifest import Manifest
from raysal.stream.output import TRUST
from raysal.stream.pool import Kept, Progress, Summary, run_pool
from raysal.stream.worker import Picture, PoolWorker, Row


def label_pool(
    manifest: Manifest,
    checkpoint_uri: str,
    out_uri: str,
    cfg: Config,
    on_progress: Progress | None = None,
    rows_per_shard: int | None = None,
    retry_failed: bool | str = False,
    replace: bool = False,
    kept: Kept | None = None,
) -> Summary:
    """Streams an archive through the model and writes one mask an image (`raysal.archive.tables.labels_schema`).

    Few images (`compute.in_process`) are done in this process, more by actors of Ray, which is started where it is not up. Masks have
    their image's own size; pixels that are not valid, or less sure than `label.precision` asks, are 255 and count as abstained. Beside
    the shards lies ``_trust.json``: the evaluation that the checkpoint carries (calibration, thresholds of confidence by class), the
    thresholds in use, and once there was one, the audit (`raysal.rounds.audit`).

    Args:
        manifest: A manifest table, or the URI of one.
        checkpoint_uri: The model.
        out_uri: Folder for the shards and ``_SUCCESS``. Images that it holds already are not done again.
        cfg: `data`'s limits, `score.batch_size`, `compute`; its digest goes into every row.
        on_progress: Called as on_progress(done, total, counts by status) after each block.
        rows_per_shard: Rows of a shard; None chooses.
        retry_failed: Do images again whose row says that they failed; or those of one status, such as ``fetch``.
        replace: Drop rows that another model or configuration left in the folder.
        kept: Holds the model from one call to the next, where the images are few.

    Returns:
        Rows by status, the checkpoint's digest, and the speed.

    Raises:
        InputError: Manifest, checkpoint, output folder or cluster can't be used; found before any long work.
        RaysalError: The run broke down.
    """
    info = read_info(checkpoint_uri)
    if cfg.label.precision is not None:
        reliability(info, checkpoint_uri)  # refused before any work
    summary = run_pool(
        LabelImages,
        manifest,
        checkpoint_uri,
        out_uri,
        schema=labels_schema(info.label_set),
        cfg=cfg,
        on_progress=on_progress,
        rows_per_shard=rows_per_shard,
        retry_failed=retry_failed,
        replace=replace,
        kept=kept,
    )
    statement = trust(info, checkpoint_uri, summary.model_digest, cfg)
    before = read_record(join(out_uri, TRUST))
    if before.get("model_digest") != summary.model_digest:
        before = {}  # another model's audit says nothing of these masks
    write_bytes(join(out_uri, TRUST), json.dumps(before | statement, indent=1).encode())
    return summary


def label_forecast(
    manifest: Manifest, checkpoint_uri: str, out_uri: str, cfg: Config, retry_failed: bool = False, replace: bool = False
) -> Forecast:
    """What `label_pool` would do and take; changes nothing. Arguments and errors as there."""
    schema = labels_schema(read_info(checkpoint_uri).label_set)
    return forecast(LabelImages, manifest, checkpoint_uri, out_uri, schema=schema, cfg=cfg, retry_failed=retry_failed, replace=replace)


def trust(info: ModelInfo, checkpoint_uri: str, digest: str, cfg: Config) -> dict[str, Any]:
    """What `TRUST` says before any audit: what was measured on val, and the thresholds under which pixels abstain."""
    wanted, kept = cfg.label.precision, None
    if wanted is not None:
        kept = reliability(info, checkpoint_uri).to_dict(info.label_set.classes, [wanted])[0]
    return {"model_digest": digest, "val": info.parents.get("metrics"), "kept": kept}


class LabelImages(PoolWorker):
    """A mask of each image, with its confidence and provenance."""

    def start(self) -> None:
        super().start()
        self.masks = Masks(self.predictor, self.cfg.label.precision, self.task.checkpoint_uri)

    def common(self) -> Row:
        return {
            "model_digest": self.task.model_digest,
            "config_digest": self.cfg.digest(),
            "raysal_version": raysal.__version__,
            "labeled_at": datetime.now(timezone.utc),
        }

    def rows(self, pictures: Sequence[Picture]) -> list[Row]:
        return [
            {
                "mask_png": encode_mask(mask.mask_HW),
                "confidence": mask.confidence,
                "abstained": mask.abstained,
                "class_fractions": mask.class_fractions,
                "source_sha256": picture.sha256,
            }
            for picture, mask in zip(pictures, self.masks.of(pictures), strict=True)
        ]
