"""What can be found out about a run in seconds, before anything is written or trained."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from raysal import cluster
from raysal.archive.uris import absolute, is_local
from raysal.config import Config
from raysal.datasets.base import Dataset, Item
from raysal.errors import ConfigError, DataError, ResourceError
from raysal.model.encoder_weights import is_file
from raysal.model.engines import settle
from raysal.model.network import TwoBranch, dropouts
from raysal.nodes import check_nodes
from raysal.query.scores import score_columns
from raysal.query.select import room
from raysal.train.ray import check_workers


def preflight(cfg: Config, dataset: Dataset) -> TwoBranch:
    """Checks of one training: cluster, batches, splits, network and its weights, disk. Returns the network.

    Raises:
        InputError: Of the kind that fits, with what to change.
    """
    check_workers(cfg)
    if cfg.data.unlabeled_split:
        dataset.split(cfg.data.unlabeled_split)
    model = TwoBranch(cfg.model, dataset.label_set.n_classes, cfg.seed)  # reads the encoder weights
    if (cfg.optim.freeze_encoder or cfg.loop.frozen_rounds) and cfg.model.encoder_weights is None:
        raise ConfigError("a frozen encoder without model.encoder_weights would stay random numbers; name weights, or let it learn")
    _check_disk(cfg, model)
    return model


def preflight_rounds(cfg: Config, pool: Sequence[Item], model: TwoBranch) -> None:
    """Checks of the queries between trainings.

    Raises:
        InputError: Of the kind that fits, with what to change.
    """
    cluster.score_actors(cfg.compute)
    settle(cfg.runtime, cfg.model, "cuda" if cfg.compute.use_gpu else "cpu")
    if "bald" in score_columns(cfg.score, cfg.query.strategy) and not dropouts(model):
        raise ConfigError(
            f"bald needs dropout, but {cfg.model.arch} has none: all its scores would be 0; set model.dropout=0.2 or take another strategy"
        )
    if cfg.query.batch in ("kcenter", "product") and not cfg.score.embedding_dim:
        raise ConfigError(f"query.batch={cfg.query.batch} measures distances between embeddings; set score.embedding_dim above 0")
    cap = cfg.query.group_cap
    if (most := room([item.group for item in pool], cap)) < cfg.loop.per_round:
        raise DataError(
            f"query.group_cap={cap} lets {most} images a round through, loop.per_round={cfg.loop.per_round} are wanted; raise the cap"
        )
    if cfg.loop.uncertainty_below and (cfg.score.aggregate != "mean" or cfg.score.class_bonus):
        raise ConfigError("loop.uncertainty_below bounds a mean over pixels; set score.aggregate=mean and score.class_bonus=false")


def preflight_nodes(cfg: Config, items: Sequence[Item]) -> None:
    """Checks that every node of a cluster sees the data and the run folder.

    Raises:
        ResourceError: It names the nodes that do not.
    """
    places = [place for item in (items[0], items[-1]) for place in (item.image, item.mask) if place]
    if (weights := cfg.model.encoder_weights) is not None and is_file(weights):
        places.append(absolute(weights))
    check_nodes(places, [absolute(cfg.run)])


def _check_disk(cfg: Config, model: TwoBranch) -> None:
    """Refuses a run whose checkpoints the local disk can't hold. Raises ResourceError with the numbers."""
    if not is_local(cfg.run):
        return
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    state = weights * (cfg.optim.name == "adamw") + weights + weights * cfg.cps.ema
    # Checkpoints of one training at a time (one more while the oldest is not deleted yet), and each round's last and best.
    need = (cfg.train.keep_checkpoints + 2) * (weights + state) + 2 * (cfg.loop.rounds + 2) * weights
    folder = cfg.run
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "."
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ResourceError(
            f"{cfg.run}: the run needs about {need / 1e9:.2f} GB for checkpoints, the disk has {free / 1e9:.2f} GB free; "
            "free some, give another run folder (run=...), or lower train.keep_checkpoints"
        )
