"""Reader of S5Mars: 6000 Mastcam images 1200 x 1200, nine classes, sparse masks (Zhang et al., TGRS 62, 2024)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from raysal.archive.uris import join
from raysal.config import DataConfig
from raysal.datasets.base import Dataset, Item
from raysal.datasets.listing import (
    MASK_SUFFIXES,
    files_by_stem,
    group_of,
    label_set_of,
    names_in,
    read_json,
    root_of,
    some,
    split_names,
    stable_order,
)
from raysal.errors import DataError
from raysal.labels import S5MARS

LOG = logging.getLogger(__name__)

PRESETS: dict[str, tuple[int, int, int]] = {"5400": (5400, 0, 600), "5000/200/800": (5000, 200, 800), "5000/500/500": (5000, 500, 500)}
"""Images of (train, val, test) by preset; 5400 has no val of its own."""
SPLIT_SEED = 0
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("labels", "masks", "label", "mask")
PARTS = ("easy", "hard")
OFFICIAL = ("new_train_random.json", "new_test_random.json")

Pairs = dict[str, tuple[str, str | None]]
"""URIs of image and mask by name."""


def read(config: DataConfig) -> Dataset:
    """Reads S5Mars as published: flat, or in the folders ``easy`` and ``hard``.

    Layouts, tried under ``data.root`` and ``data.root/Final``: ``images/STEM.jpg`` + ``labels/STEM.png``; the same inside ``easy/``
    and ``hard/``; there also image and mask side by side. Where easy and hard share stems, names are ``easy/STEM``.

    Splits, the first of: ``splits.json`` (``{"train": [stems], "val": ..., "test": ...}``); the authors'
    ``new_train_random.json`` and ``new_test_random.json`` (lists of stems; val: the images that neither names); the preset. The
    authors' lists are not public, so a preset is raysal's own cut with the published sizes: names in a seeded hash order, test from
    the front, then val, then train, in proportion where images are missing. So the three presets nest: the 600 test images of
    ``5400`` are among the 800 of ``5000/200/800``.

    Where there is no val set of its own (preset ``5400``, lists without a rest), val **is** test: report such numbers as
    test numbers, and choose nothing by them.

    Raises:
        DataError: No layout found (the message says what was looked for), or a split file that does not fit the images.
    """
    root, present = root_of(config)
    pairs, base = _find(root, present)
    names = _split(config, [u for u in (root, base) if u], pairs)
    items = {
        split: tuple(Item(n, pairs[n][0], mask=pairs[n][1], group=group_of(n.rpartition("/")[2])) for n in chosen)
        for split, chosen in names.items()
    }
    return Dataset("s5mars", label_set_of(config, S5MARS), items, config.max_bytes, config.max_pixels)


def preset_split(names: Sequence[str], preset: str) -> dict[str, list[str]]:
    """Cuts names by a preset, in proportion where there are not 6000; each split is sorted.

    Returns:
        ``train``, ``val`` and ``test``; val is test where the preset has no val. Every part holds at least one name where there are
        three or more.
    """
    total = sum(PRESETS[preset])
    order = stable_order(names, SPLIT_SEED)
    _, val, test = (max(1, round(len(order) * part / total)) if part else 0 for part in PRESETS[preset])
    if len(order) < 3:
        raise DataError(f"S5Mars with {len(order)} images can't be split into train, val and test; restore the images or write splits.json")
    cut = {"train": sorted(order[test + val :]), "val": sorted(order[test : test + val]), "test": sorted(order[:test])}
    return cut if val else {**cut, "val": cut["test"]}


def _find(root: str, present: Sequence[str]) -> tuple[Pairs, str]:
    """All pairs, and the folder that they were found in."""
    bases = [root, *(join(root, n) for n in present if n.lower() == "final")]
    for base in bases:
        listed = present if base == root else names_in(base)
        if pairs := _pairs(base, listed):
            return pairs, base
        parts = {n.lower(): join(base, n) for n in listed if n.lower() in PARTS}
        found = {part: _pairs(uri, names_in(uri), side_by_side=True) for part, uri in sorted(parts.items())}
        if any(found.values()):
            if len(parts) < len(PARTS):
                LOG.warning("%s: only %s of easy and hard is there; half of S5Mars is missing", base, ", ".join(parts))
            return _joined(found), base
    raise DataError(
        f"{root}: no S5Mars images with masks here (it holds {some(present)}); looked for {'/, '.join(IMAGE_FOLDERS)}/ of .jpg beside "
        f"{'/, '.join(MASK_FOLDERS)}/ of .png, here, in Final/, in easy/ and in hard/; give the folder that holds them"
    )


def _pairs(base: str, listed: Sequence[str], side_by_side: bool = False) -> Pairs:
    """Images of one folder pair with their masks; empty unless some image has one."""
    lower = {n.lower(): n for n in listed}
    image_folder = next((lower[n] for n in IMAGE_FOLDERS if n in lower), None)
    mask_folder = next((lower[n] for n in MASK_FOLDERS if n in lower), None)
    if image_folder and mask_folder:
        images, masks = files_by_stem(join(base, image_folder)), files_by_stem(join(base, mask_folder), MASK_SUFFIXES)
    elif side_by_side:
        images, masks = files_by_stem(base, (".jpg", ".jpeg")), files_by_stem(base, MASK_SUFFIXES)
    else:
        return {}
    return {stem: (uri, masks.get(stem)) for stem, uri in images.items()} if images.keys() & masks.keys() else {}


def _joined(found: Mapping[str, Pairs]) -> Pairs:
    stems = [stem for pairs in found.values() for stem in pairs]
    shared = len(set(stems)) < len(stems)
    return {f"{part}/{stem}" if shared else stem: pair for part, pairs in found.items() for stem, pair in pairs.items()}


def _split(config: DataConfig, folders: Sequence[str], pairs: Pairs) -> dict[str, list[str]]:
    """Names of each split from the first split file found, else from the preset."""
    listed = {name: join(folder, name) for folder in reversed(folders) for name in names_in(folder) if name.endswith(".json")}
    if "splits.json" in listed:
        uri = listed["splits.json"]
        raw = read_json(uri, 'expected {"train": [stems], "val": [stems], "test": [stems]}')
        if not isinstance(raw, dict) or "train" not in raw or not {"val", "test"} & raw.keys():
            raise DataError(f'{uri}: expected {{"train": [stems], "val": [stems], "test": [stems]}}, val or test may be missing')
        splits = {str(split): _known(split_names(names, f"{uri}: split {split!r}"), pairs, uri) for split, names in raw.items()}
        return {"val": splits.get("val") or splits["test"], **splits}
    if not set(OFFICIAL) & listed.keys():
        if len(pairs) != 6000:
            LOG.warning("S5Mars has 6000 images, here are %d; preset %s is cut in proportion", len(pairs), config.s5mars_preset)
        return preset_split(list(pairs), config.s5mars_preset)
    if missing := [name for name in OFFICIAL if name not in listed]:
        raise DataError(f"{folders[0]}: {missing[0]} is missing beside the other list; restore it, or take both away to use a preset")
    train, test = (
        _known(split_names(read_json(listed[name], "expected a list of stems"), listed[name]), pairs, listed[name]) for name in OFFICIAL
    )
    rest = sorted(pairs.keys() - set(train) - set(test))
    if len(train) != PRESETS[config.s5mars_preset][0]:
        LOG.warning("%s: %d training images, not the preset's; split files win over data.s5mars_preset", listed[OFFICIAL[0]], len(train))
    return {"train": train, "val": rest or test, "test": test}


def _known(names: list[str], pairs: Pairs, uri: str) -> list[str]:
    if missing := [n for n in names if n not in pairs]:
        raise DataError(f"{uri}: names {len(missing)} of {len(names)} images that are not there: {some(missing)}; restore them")
    return names
