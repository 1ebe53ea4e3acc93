"""The model in use, and what a new one must show before it takes over."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from raysal.answers import Masks, Scores
from raysal.archive.fetch import fetch_image, fetch_label
from raysal.archive.uris import exists, join, list_names
from raysal.config import DataConfig, ScoreConfig
from raysal.datasets import folder
from raysal.datasets.synthetic import scene
from raysal.errors import CheckpointError, InputError
from raysal.images.decode import decode_image
from raysal.model.checkpoint import digest_at, read_info, require_classes
from raysal.model.engines import settle
from raysal.model.metrics import confusion, miou
from raysal.model.runtime import Predictor
from raysal.serving.settings import Gate, ModelSpec, Settings

log = logging.getLogger("ray.serve")

SCORES = ("entropy", "uncertainty", "least_confidence", "margin", "disagreement")
"""What is told of an image beside its mask."""

RECENT_BYTES = 64 * 2**20
"""Of the network's answers that a replica remembers: an image's mask, scores and maps, and its next view, come from one pass. Hundreds of
small images, a dozen of a megapixel. Kept pieces leave gaps in the heap: a replica grows by three to five times as much, then no more."""

SHORTEST_DIGEST = 12
LARGEST_SCENE_PX, SCENES = 1024, 4
REFERENCE_IMAGES = 64
"""Images of a reference that are looked at, at most; a swap should take seconds."""


@dataclass(frozen=True)
class Model:
    """A loaded model with all that answers come from; requests hold on to the one that they began with."""

    spec: ModelSpec
    predictor: Predictor
    runtime: str

    @property
    def digest(self) -> str:
        return self.predictor.digest

    @cached_property
    def masks(self) -> Masks:
        return Masks(self.predictor, self.spec.precision, self.spec.checkpoint)

    @cached_property
    def scores(self) -> Scores:
        return Scores(self.predictor, ScoreConfig(scores=SCORES, embedding_dim=0))


def load(spec: ModelSpec, settings: Settings) -> Model:
    """A model, checked as far as that goes without another: its files, its digest, its runtime, one image through it.

    Raises:
        CheckpointError: Nothing there, damaged, another digest than the spec's, or a runtime that changes its masks.
        InputError: A precision is wanted that was never measured.
    """
    device = "cuda" if settings.use_gpu else "cpu"
    if spec.digest is not None:
        found = digest_at(spec.checkpoint)
        if len(spec.digest) < SHORTEST_DIGEST or not found.startswith(spec.digest.lower().removeprefix("sha256:")):
            raise CheckpointError(
                f"{spec.checkpoint}: has digest {found[:SHORTEST_DIGEST]}, {spec.digest[:SHORTEST_DIGEST]!r} is asked for; "
                f"name the right checkpoint, or at least {SHORTEST_DIGEST} digits of its digest"
            )
    runtime = settle(settings.runtime, read_info(spec.checkpoint).model, device)
    model = Model(spec, Predictor.load(spec.checkpoint, device, runtime, RECENT_BYTES), str(runtime))
    image_HWC = _scene(0, 0, model)
    if not np.isfinite(model.predictor.predict([image_HWC]).confidence).all():
        raise CheckpointError(f"{spec.checkpoint}: the network's output is not finite; was the training stable?")
    _ = model.masks  # refuses a precision that was never measured, before any request
    return model


def following(new: Model, old: Model) -> ModelSpec:
    """The spec of a model that takes over from another: with its digest, and those of the two before, so that it can go back."""
    before = old.spec.previous and old.spec.previous.model_copy(update={"previous": None})
    previous = old.spec.model_copy(update={"digest": old.digest, "previous": before})
    return new.spec.model_copy(update={"digest": new.digest, "previous": previous})


def check_successor(new: Model, old: Model, gate: Gate) -> str:
    """Holds a new model against the one in use.

    The model that was in use before the old one may come back whatever the gate says: to go back is for when the old one is at fault.

    Returns:
        What was found, in one sentence.

    Raises:
        CheckpointError: Other classes, or it does worse than the gate allows.
    """
    label_set = old.predictor.info.label_set
    require_classes(new.spec.checkpoint, new.predictor.info, label_set)
    if old.spec.previous is not None and old.spec.previous.digest == new.digest:
        return "the one that was in use before"
    same = pixels = 0
    n = label_set.n_classes
    truth_old, truth_new = confusion(np.zeros(0, int), np.zeros(0, int), n), confusion(np.zeros(0, int), np.zeros(0, int), n)
    for image_HWC, mask_HW in _reference(gate, old):
        before_HW, after_HW = (model.predictor.masks([image_HWC])[0] for model in (old, new))
        same, pixels = same + int((before_HW == after_HW).sum()), pixels + before_HW.size
        if mask_HW is not None:
            truth_old += confusion(before_HW.astype(int), mask_HW.astype(int), n)
            truth_new += confusion(after_HW.astype(int), mask_HW.astype(int), n)
    agreement = same / max(1, pixels)
    looked, least, knob = "the reference", gate.agreement, "gate.agreement"
    if gate.reference is None:
        looked, least, knob = "made-up scenes", gate.made_up, "gate.made_up; better, name a gate.reference"
    said = f"{100 * agreement:.1f}% of the pixels of {looked} keep their class"
    if truth_old.sum():
        was, is_ = miou(truth_old), miou(truth_new)
        said = f"mIoU on the reference {is_:.3f}, before {was:.3f}; {said}"
        if not is_ >= was - gate.miou_drop:
            raise CheckpointError(f"{new.spec.checkpoint}: {said}; it may fall by {gate.miou_drop:g} (gate.miou_drop), the old model stays")
    elif agreement < least:
        raise CheckpointError(f"{new.spec.checkpoint}: {said}, {100 * least:g}% are asked for ({knob}); the old model stays")
    return said


def _reference(gate: Gate, model: Model) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Images and, where there are any, their masks (255 = not labelled)."""
    if gate.reference is None:
        yield from ((_scene(1, i, model), None) for i in range(SCENES))
        return
    if exists(join(gate.reference, "splits.json")):
        data = folder.read(DataConfig(reader="folder", root=gate.reference))
        if data.label_set.classes != model.predictor.info.label_set.classes:
            raise InputError(
                f"gate.reference {gate.reference}: its classes ({', '.join(data.label_set.classes)}) are not the model's; name another"
            )
        for item in data.split("val")[:REFERENCE_IMAGES]:
            image_HWC = data.image(item)
            yield image_HWC, data.mask(item, image_HWC.shape[:2])
        return
    names = list_names(gate.reference)[:REFERENCE_IMAGES]
    if not names:
        raise InputError(f"gate.reference {gate.reference}: no images there; give a folder of some, or a data set with a val split")
    limits = DataConfig()
    for name in names:
        uri = join(gate.reference, name)
        yield decode_image(fetch_image(uri, limits.max_bytes), limits.max_pixels, uri, partial(fetch_label, uri)), None


def _scene(seed: int, number: int, model: Model) -> np.ndarray:
    return scene(seed, number, min(max(64, model.predictor.info.tile_px), LARGEST_SCENE_PX))[0]
