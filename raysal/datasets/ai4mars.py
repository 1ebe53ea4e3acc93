"""Reader of AI4Mars, Curiosity part: grey Navcam or colour Mastcam images, four classes (Swan et al., CVPRW 2021)."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Mapping, Sequence

from raysal.archive.uris import join
from raysal.config import DataConfig
from raysal.datasets.base import Dataset, Item
from raysal.datasets.listing import MASK_SUFFIXES, files_by_stem, group_of, hold_out, label_set_of, names_in, root_of, some
from raysal.errors import DataError
from raysal.labels import AI4MARS

LOG = logging.getLogger(__name__)

VAL_SHARE = 0.1
SPLIT_SEED = 0
EXCLUDE_FOLDERS = {"mxy": "MXY", "rng-30m": "RNG"}
"""Masks known without labels: the rover's own body, and terrain farther than 30 m; their stems replace EDR."""
GOLD = ("min1", "min2", "min3")
RELEASE = "ai4mars-dataset-merged"


def read(config: DataConfig) -> Dataset:
    """Reads AI4Mars releases 0.1 (``msl/images/edr``) and 0.6 (``msl/ncam/images/edr``, ``msl/mcam/images``).

    Args:
        config: ``root`` is the release's folder, the folder above it, or its ``msl``; ``ai4mars_camera`` picks the camera,
            ``ai4mars_gold`` how many experts must agree on a test mask.

    Splits: ``test`` is the experts' gold set (ncam only). Crowd-labelled images that no gold set holds are ``train`` and ``val``:
    val is whole (site, drive) groups (sols for mcam) in a seeded stable order, up to a tenth of the images, because images of one stop
    show the same rocks. ``unlabeled`` is the images without any mask.

    Rover and range masks become `Item.exclude`. A label belongs to the image of the same camera whose stem it has once ``_merged``
    and then trailing ``_<digits>`` and ``_T<digits>`` are taken off, one after another, until a stem fits.

    Raises:
        DataError: No such layout or camera (the message says what was looked for), or labels that fit no image.
    """
    camera, where = _camera(config)
    is_navcam = config.ai4mars_camera == "ncam"
    images = files_by_stem(join(camera, "images", "edr") if is_navcam else join(camera, "images"))
    if not images:
        raise DataError(f"{where}: no images (.JPG) in it; unpack the release again")
    labels = _paired(join(camera, "labels", "train"), images)
    gold = {level: _paired(join(camera, "labels", "test", f"masked-gold-{level}-100agree"), images) for level in GOLD if is_navcam}
    if not labels:
        raise DataError(f"{camera}/labels/train: no mask (.png) here fits an image of {where}; unpack the release again")
    exclude = _excludes(camera, images) if is_navcam else {}
    expert = {stem for masks in gold.values() for stem in masks}
    groups = {stem: group_of(stem) for stem in images}
    crowd = {stem: uri for stem, uri in labels.items() if stem not in expert}
    val = hold_out({stem: groups[stem] for stem in crowd}, VAL_SHARE, SPLIT_SEED)

    def items(masks: Mapping[str, str | None]) -> tuple[Item, ...]:
        return tuple(Item(s, images[s], masks[s], exclude.get(s, ()), groups[s]) for s in sorted(masks))

    splits = {
        "train": items({s: uri for s, uri in crowd.items() if s not in val}),
        "val": items({s: crowd[s] for s in val}),
        "unlabeled": items({s: None for s in images if s not in labels and s not in expert}),
    }
    if gold.get(config.ai4mars_gold):
        splits["test"] = items(gold[config.ai4mars_gold])
    return Dataset(f"ai4mars-{config.ai4mars_camera}", label_set_of(config, AI4MARS), splits, config.max_bytes, config.max_pixels)


def label_keys(stem: str) -> list[str]:
    """Image stems that a label's stem may mean, the closest first.

    ``X_12_T0_merged`` gives itself, ``X_12_T0``, ``X_12`` and ``X``; an image stem that itself ends in digits is met before it is cut.
    """
    keys = [stem]
    bare = re.sub(r"_merged\d*$", "", stem)
    while bare != keys[-1]:
        keys.append(bare)
        bare = re.sub(r"_T?\d+$", "", bare)
    return keys


def _camera(config: DataConfig) -> tuple[str, str]:
    """Folder of the camera (that holds images/ and labels/), and the folder of its images for messages."""
    root, present = root_of(config)
    msl, listed = root, list(present)
    if not {"ncam", "mcam", "images"} & set(present):
        release = next((n for n in present if n.startswith(RELEASE)), None) if "msl" not in present else None
        msl = join(root, release, "msl") if release else join(root, "msl")
        listed = names_in(msl)
    if config.ai4mars_camera in listed:
        camera = join(msl, config.ai4mars_camera)
    elif "images" in listed and config.ai4mars_camera == "ncam":
        camera = msl  # release 0.1 has the Navcam alone
    else:
        raise DataError(
            f"{root}: no AI4Mars {config.ai4mars_camera} images here (it holds {some(present)}); looked for "
            f"msl/{config.ai4mars_camera}/images" + (", msl/images/edr" if config.ai4mars_camera == "ncam" else "")
            + f" and {RELEASE}-*/msl; give the unpacked release's folder"
        )  # fmt: skip
    return camera, join(camera, "images", "edr") if config.ai4mars_camera == "ncam" else join(camera, "images")


def _paired(folder: str, images: Mapping[str, str]) -> dict[str, str]:
    """Mask URI by image stem. Raises DataError where two masks mean one image; warns of masks without an image."""
    pairs: dict[str, str] = {}
    strays: list[str] = []
    for stem, uri in files_by_stem(folder, MASK_SUFFIXES).items():
        key = next((k for k in label_keys(stem) if k in images), None)
        if key is None:
            strays.append(posixpath.basename(uri))
        elif key in pairs:
            raise DataError(f"{folder}: {posixpath.basename(pairs[key])} and {posixpath.basename(uri)} both label {key}; keep one")
        else:
            pairs[key] = uri
    if strays:
        LOG.warning("%s: %d masks fit no image and are left out: %s", folder, len(strays), some(strays))
    return pairs


def _excludes(camera: str, images: Sequence[str] | Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Rover and range masks by image stem; an image may have both, one or none."""
    found = {mark: files_by_stem(join(camera, "images", folder), MASK_SUFFIXES) for folder, mark in EXCLUDE_FOLDERS.items()}
    return {stem: tuple(masks[key] for mark, masks in found.items() if (key := stem.replace("EDR", mark, 1)) in masks) for stem in images}
