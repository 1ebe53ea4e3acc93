"""From a configuration to a data set, and the check that finds what is wrong with one before any long work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from raysal.archive.uris import exists, join, open_fs, read_bytes, write_bytes
from raysal.config import DataConfig
from raysal.datasets import ai4mars, folder, s5mars
from raysal.datasets.base import Dataset, Item
from raysal.datasets.listing import some
from raysal.errors import DataError, ImageError
from raysal.images.decode import image_size
from raysal.labels import LabelSet

READERS: dict[str, Callable[[DataConfig], Dataset]] = {"folder": folder.read, "s5mars": s5mars.read, "ai4mars": ai4mars.read}
"""Readers of data on disk; ``synthetic`` is generated first and then read by ``folder``, see `build`."""

CHECK_THREADS = 8
HEADER_BLOCK = 64 * 2**10
PROBLEMS_SHOWN = 5


def build(config: DataConfig, run_uri: str) -> Dataset:
    """The data set that a configuration names.

    Args:
        config: ``reader: synthetic`` is generated once into ``run_uri/data``; an interrupted generation goes on where it stopped.
        run_uri: The run's folder; only ``synthetic`` writes there.

    Raises:
        DataError: The data can't be read, or the run's folder holds synthetic scenes of another seed or size.
    """
    if config.reader != "synthetic":
        return READERS[config.reader](config)
    from raysal.datasets.synthetic import write_archive

    root, made = join(run_uri, "data"), config.synthetic
    marker, wanted = join(root, "_SUCCESS"), made.model_dump_json().encode()
    if not exists(marker) or read_bytes(marker) != wanted:
        write_archive(root, made.images, made.val_images, made.size_px, made.seed)
        write_bytes(marker, wanted)
    return replace(folder.read(config.model_copy(update={"root": root})), name="synthetic")


def class_pixels(mask_HW: np.ndarray, n: int) -> np.ndarray:
    """Pixels of each class in a mask of class ids.

    Args:
        mask_HW: uint8 [H, W]; ids from n on (255 = not labelled) are not counted.
        n: Number of classes.

    Returns:
        int64 [n].
    """
    return np.bincount(mask_HW.reshape(-1), minlength=256)[:n].astype(np.int64)


def check(
    dataset: Dataset,
    splits: Sequence[str],
    n: int | None = None,
    *,
    pool: Collection[str] = ("train", "unlabeled"),
    unlabeled: Collection[str] = ("unlabeled",),
) -> list[str]:
    """Looks at every mask, every image's header, and every image to measure on, before long work starts.

    Args:
        dataset: What to check.
        splits: Names of the splits that the work will use.
        n: Look at only this many images of each split, spread evenly; None looks at all.
        pool: Splits whose unreadable images are only warned of, since a pool's bad images become rows with a status. Only headers are
            read there; images of other splits are decoded.
        unlabeled: Splits whose images need no mask.

    Returns:
        Warnings in sentences: unreadable pool images, masks that label nothing, classes that no mask of a split shows, groups or
        whole splits that two splits share.

    Raises:
        DataError: An unknown or empty split, images in two splits, or masks that are missing, damaged, of another size than
            their image, or hold unknown values. Up to five problems are listed, and how many there are.
    """
    items = {split: dataset.split(split) for split in splits}
    problems, warnings = _overlaps(items)
    for split, all_items in items.items():
        chosen = all_items if n is None or n >= len(all_items) else [all_items[i * len(all_items) // n] for i in range(n)]
        needs_mask = split not in unlabeled

        def look(item: Item, needs_mask: bool = needs_mask, decode: bool = split not in pool) -> Look:
            return _look(dataset, item, needs_mask, decode)

        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            looks = list(threads.map(look, chosen))
        unreadable = [look.unreadable for look in looks if look.unreadable]
        problems += [look.problem for look in looks if look.problem]
        if split in pool:
            warnings += [f"images of split {split!r} that can't be used: {len(unreadable)}, first {unreadable[0]}"] if unreadable else []
        else:
            problems += unreadable
        warnings += _label_warnings(split, looks, len(all_items), dataset.label_set)
    if problems:
        more = f"\nand {len(problems) - PROBLEMS_SHOWN} more problems" if len(problems) > PROBLEMS_SHOWN else ""
        raise DataError(f"data set {dataset.name!r} can't be used:\n" + "\n".join(problems[:PROBLEMS_SHOWN]) + more)
    return warnings


@dataclass(frozen=True)
class Look:
    """What `check` saw of one item: why the image can't be used, what is wrong with its mask, pixels by class (int64 [C])."""

    unreadable: str | None = None
    problem: str | None = None
    pixels_C: np.ndarray | None = None


def _look(dataset: Dataset, item: Item, needs_mask: bool, decode: bool) -> Look:
    try:
        shape_HW = dataset.image(item).shape[:2] if decode else _size(item.image, dataset.max_pixels)
        if item.mask is None and not needs_mask:
            dataset.valid(item, shape_HW)
            return Look()
        return Look(pixels_C=class_pixels(dataset.mask(item, shape_HW), dataset.label_set.n_classes))
    except ImageError as error:
        missing = f"{item.image}: has no mask; add one or take the image out of the split" if needs_mask and item.mask is None else None
        return Look(unreadable=str(error), problem=missing)
    except DataError as error:
        return Look(problem=str(error))


def _size(uri: str, max_pixels: int) -> tuple[int, int]:
    """Height and width from as few bytes as the store can give. Raises ImageError."""
    try:
        fs, path = open_fs(uri)
        with fs.open(path, "rb", block_size=HEADER_BLOCK) as file:
            return image_size(file, max_pixels, uri)
    except ImageError:
        raise
    except Exception as error:  # drivers raise their own types; every one means that the bytes are not to be had
        raise ImageError("fetch", f"{uri}: {type(error).__name__}: {error}") from error


def _overlaps(items: dict[str, tuple[Item, ...]]) -> tuple[list[str], list[str]]:
    """Problems and warnings of splits that share images or groups."""
    problems, warnings = [], []
    names = list(items)
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            ours, theirs = {i.name for i in items[first]}, {i.name for i in items[second]}
            shared = sorted(ours & theirs)
            if shared and ours == theirs:
                warnings.append(f"splits {first!r} and {second!r} are the same images; choose nothing by one and report it by the other")
            elif shared:
                problems.append(f"splits {first!r} and {second!r} share images: {some(shared)}; keep each in one split")
            both = {i.group for i in items[first]} & {i.group for i in items[second]} - {""}
            if both and not shared:
                warnings.append(
                    f"splits {first!r} and {second!r} share groups (site and drive, or panorama): {some(sorted(both))}; "
                    "near-duplicates flatter the metrics"
                )
    return problems, warnings


def _label_warnings(split: str, looks: Sequence[Look], total: int, label_set: LabelSet) -> list[str]:
    pixels = [look.pixels_C for look in looks if look.pixels_C is not None]
    if not pixels:
        return []
    where = f"split {split!r}" if len(looks) == total else f"the {len(looks)} of {total} images looked at of split {split!r}"
    blank = sum(not p.any() for p in pixels)
    warnings = [f"masks of {where} without one labelled pixel: {blank}"] if blank else []
    seen_C = np.sum(pixels, axis=0) > 0
    return warnings + [
        f"class {name!r} appears in no mask of {where}" for name, seen in zip(label_set.classes, seen_C, strict=True) if not seen
    ]
