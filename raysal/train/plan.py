"""What one training is. Kept apart from the loop, so that processes which only pass it on need not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from raysal.config import Config, ModelConfig, digest_of
from raysal.datasets.base import Dataset, Item

CHECKPOINT_FILES = ("model.safetensors", "model.json")


@dataclass(frozen=True)
class Plan:
    """Everything that decides one training.

    Attributes:
        cfg: The configuration.
        dataset: Reads pixels; knows the label set.
        labeled: Images whose labels are bought.
        unlabeled: Images for the unlabelled loss; empty turns it off.
        val: Images for metrics; empty skips evaluation.
        pixels, images: Labelled pixels, and labelled images holding it, of each class (for class weights).
        start: Checkpoint whose weights both branches start from (warm start), or None.
        parents: Where this model comes from, kept in its checkpoint.
        weights: Where workers, whose working folder is another one, find the file of `model.encoder_weights`; None as it is given.
    """

    cfg: Config
    dataset: Dataset
    labeled: tuple[Item, ...]
    unlabeled: tuple[Item, ...]
    val: tuple[Item, ...]
    pixels: tuple[int, ...]
    images: tuple[int, ...]
    start: str | None = None
    parents: dict = field(default_factory=dict)
    weights: str | None = None

    @property
    def model(self) -> ModelConfig:
        """Of the network to begin with."""
        return self.cfg.model if self.weights is None else self.cfg.model.model_copy(update={"encoder_weights": self.weights})

    @property
    def semi_supervised(self) -> bool:
        return bool(self.unlabeled) and self.cfg.cps.weight > 0

    @property
    def mixed(self) -> int:
        """Unlabelled images that are read for one that is learnt from: CutMix mixes two."""
        return 2 if self.cfg.cps.cutmix else 1

    @property
    def unlabeled_batch(self) -> int:
        """Unlabelled images read per step over all workers."""
        return self.cfg.train.batch_unlabeled * self.mixed

    def schedule(self) -> str:
        """Digest of what a checkpoint must share with this plan to be resumed."""
        names = [[item.name for item in items] for items in (self.labeled, self.unlabeled, self.val)]
        return digest_of([self.cfg.training_digest(), names, self.start])
