"""Scores every image of a pool with both branches: what `raysal.query.select` chooses from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from raysal.archive.tables import scores_schema
from raysal.config import Config
from raysal.errors import ConfigError, InputError
from raysal.images.tiles import Grid
from raysal.model.checkpoint import read_info
from raysal.model.runtime import batches
from raysal.query.pooling import TileScores
from raysal.query.scores import Bald, measure, score_columns, score_images
from raysal.stream.forecast import Forecast, forecast
from raysal.stream.pool import Progress, Summary, run_pool
from raysal.stream.worker import Picture, PoolWorker, Row

PROJECTION_SEED = 20_260_101
"""Of the embeddings' projection; a constant, so that embeddings of different runs compare."""


def score_pool(
    manifest: pa.Table | str,
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

    Ray is started unless it is up, or the images are few (`compute.in_process`). Scores do not depend on shards, order, batch size or
    number of actors. No label of the pool can be read: of a manifest only id, uri and the exclude masks are.

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
    manifest: pa.Table | str, checkpoint_uri: str, out_uri: str, cfg: Config, retry_failed: bool = False, replace: bool = False
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

    def common(self) -> Row:
        return {"model_digest": self.task.model_digest, "scored_at": datetime.now(timezone.utc)}

    def rows(self, pictures: Sequence[Picture]) -> list[Row]:
        cfg = self.cfg.score
        grid = self.predictor.grid(pictures[0].shape_HW)
        if grid is None:
            images, valid_BHW = [p.image_HWC for p in pictures], torch.from_numpy(np.stack([p.valid_HW for p in pictures]))
            z1, z2, features = self.predictor.logits_and_features(images, cfg.resolution)
            bald = self._bald([p.source.id for p in pictures], images) if "bald" in cfg.scores else None
            found = score_images(z1, z2, valid_BHW.to(z1.device), cfg, self.task.class_bonus, bald)
        else:
            parts = [self._in_tiles(p, grid) for p in pictures]
            found = {name: np.concatenate([scores[name] for scores, _ in parts]) for name in parts[0][0]}
            features = torch.cat([features_1D for _, features_1D in parts])
        fractions = found.pop("class_fractions").astype(np.float32)
        embeddings = embed(features, cfg.embedding_dim)
        rows = []
        for i, picture in enumerate(pictures):
            row: Row = {name: float(score[i]) for name, score in found.items()}
            if not np.isfinite(list(row.values())).all() or not np.isfinite(embeddings[i]).all():
                raise ValueError(f"the network's output for {picture.source.uri} is not finite; was the training stable?")
            row["class_fractions"] = fractions[i]
            if cfg.embedding_dim:
                row["embedding"] = embeddings[i]
            rows.append(row)
        return rows

    def _in_tiles(self, picture: Picture, grid: Grid) -> tuple[dict[str, np.ndarray], Tensor]:
        """Scores of one image, and its embedding [1, D]: the mean of its tiles', by what of each is valid and theirs."""
        cfg = self.cfg.score
        scores, total_D = TileScores(cfg, len(grid.rows) * len(grid.cols)), torch.zeros((), dtype=torch.float64)
        for tiles in batches(enumerate(grid.tiles()), self.predictor.at_once):
            images = [tile.of(picture.image_HWC) for _, tile in tiles]
            z1, z2, features_BD = self.predictor.logits_and_features(images, cfg.resolution)
            valid_BHW = torch.from_numpy(np.stack([tile.of(picture.valid_HW) for _, tile in tiles])).to(z1.device)
            share_BHW = torch.from_numpy(np.stack([tile.weight_HW for _, tile in tiles])).to(z1.device)
            bald = self._bald([f"{picture.source.id}/{k}" for k, _ in tiles], images) if "bald" in cfg.scores else None
            measured = measure(z1, z2, valid_BHW, cfg, self.task.class_bonus, bald, share_BHW)
            scores.add(measured)
            for features_D, counts in zip(features_BD.double().cpu(), measured.weight_Bn.sum(1).double().cpu(), strict=True):
                total_D = total_D + features_D * counts
        return scores.scores(), functional.normalize(total_D[None].float(), dim=1)

    def _bald(self, names: Sequence[str], images: Sequence[np.ndarray]) -> Tensor:
        """The map of `Bald`; draws follow (seed, image id, pass), so that no shard, order or batch changes them."""
        maps = []
        for name, image_HWC in zip(names, images, strict=True):
            bald, seed = Bald(), dropout_seed(self.cfg.seed, name)
            for z1, z2 in self.predictor.mc_logits(image_HWC, seed, self.cfg.score.bald_passes, self.cfg.score.resolution):
                bald.add(z1 / self.cfg.score.temperature, z2 / self.cfg.score.temperature)
            maps.append(bald.map())
        return torch.cat(maps)


def dropout_seed(seed: int, image_id: str) -> int:
    """A 63-bit seed from (seed, id)."""
    digest = hashlib.blake2b(f"dropout:{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def embed(features_BD: Tensor, dim: int) -> np.ndarray:
    """Embeddings of a fixed length from encoder features of any.

    More features than `dim` are projected by a fixed Gaussian matrix, which keeps cosine distances up to
    about 1/sqrt(dim) (Johnson and Lindenstrauss, 1984); fewer are padded with zeros, which keeps them exactly.

    Args:
        features_BD: float [B, D].
        dim: Length wanted; 0 gives [B, 0].

    Returns:
        float16 [B, dim], L2-normalised.
    """
    f_BD = features_BD.float().cpu().numpy()
    own = f_BD.shape[1]
    if own > dim:
        # RandomState: its stream is frozen for ever, that of newer generators may change with numpy.
        matrix_DE = np.random.RandomState(PROJECTION_SEED).standard_normal((own, dim)).astype(np.float32)
        f_BD = np.stack([f_D @ matrix_DE for f_D in f_BD])  # row by row: the last bits of a product of matrices follow the batch
    else:
        f_BD = np.pad(f_BD, ((0, 0), (0, dim - own)))
    return (f_BD / np.maximum(np.linalg.norm(f_BD, axis=1, keepdims=True), 1e-12)).astype(np.float16)
