"""Reader of the plain layout: ``images/``, ``masks/``, ``classes.json``, ``splits.json``."""

from __future__ import annotations

import csv
import io
import posixpath

from raysal.archive.uris import join
from raysal.config import DataConfig
from raysal.datasets.base import Dataset, Item
from raysal.datasets.listing import files_by_stem, label_set_of, read_json, read_text, root_of, some, split_names
from raysal.errors import DataError

UNLABELED = "unlabeled"
GROUP_FILES = ("groups.csv", "tiles.csv")
GROUP_COLUMNS = ("group", "panorama", "site_group")


def read(config: DataConfig) -> Dataset:
    """Reads a folder of images and masks.

    Layout under ``data.root``: ``images/NAME.{jpg,jpeg,png,tif,tiff}``; ``masks/NAME.{png,tif,tiff}``; ``classes.json`` (see
    `LabelSet.from_dict`; not needed where ``data.label_set`` is set); ``splits.json``, ``{"train": [names], "val": [names], ...}``.
    Images of a split named ``unlabeled`` may lie in ``unlabeled/`` instead. Groups, all optional: ``groups.csv`` or ``tiles.csv``
    with a column ``name`` and one of ``group``, ``panorama``, ``site_group``, or ``"groups": {name: group}`` in ``splits.json``.

    A split none of whose images lies there is left out, unless the configuration names it. Splits keep the order of their file.

    Raises:
        DataError: A file or folder is missing or can't be read, or a split names images that are not there.
    """
    root, present = root_of(config)
    if "splits.json" not in present:
        raise DataError(f'{root}: has no splits.json; write one such as {{"train": ["name1", "name2"], "val": ["name3"]}}')
    label_set = label_set_of(config, None, join(root, "classes.json"))
    splits = read_json(join(root, "splits.json"), 'expected {"train": [names], "val": [names]}')
    if not isinstance(splits, dict):
        raise DataError(f'{root}/splits.json: holds a {type(splits).__name__}; expected {{"train": [names], "val": [names]}}')
    groups = _groups(root, present, splits.pop("groups", {}))
    images, masks = files_by_stem(join(root, "images")), files_by_stem(join(root, "masks"))
    unlabeled = files_by_stem(join(root, UNLABELED)) if UNLABELED in present else {}
    if not images and not unlabeled:
        raise DataError(f"{root}: images/ holds no image (.jpg, .jpeg, .png, .tif, .tiff); put the images there")
    needed = {config.pool_split, config.val_split, config.unlabeled_split}
    items: dict[str, tuple[Item, ...]] = {}
    for split, raw in splits.items():
        names = split_names(raw, f"{root}/splits.json: split {split!r}")
        where = {**images, **unlabeled} if split == UNLABELED else images
        missing = [n for n in names if n not in where]
        if missing and len(missing) == len(names) and split not in needed:
            continue
        if missing:
            raise DataError(
                f"{root}/splits.json: split {split!r} names {len(missing)} of {len(names)} images that are not in images/: "
                f"{some(missing)}; restore them or take the names out"
            )
        items[split] = tuple(
            Item(n, where[n], mask=None if n in unlabeled and split == UNLABELED else masks.get(n), group=groups.get(n, "")) for n in names
        )
    return Dataset(posixpath.basename(root.rstrip("/")), label_set, items, config.max_bytes, config.max_pixels)


def _groups(root: str, present: list[str], listed: object) -> dict[str, str]:
    """Group of each name from the first group file that is there, else from splits.json."""
    if not isinstance(listed, dict):
        raise DataError(f'{root}/splits.json: "groups" must map names to groups, got a {type(listed).__name__}')
    groups = {str(name): str(group) for name, group in listed.items()}
    file = next((f for f in GROUP_FILES if f in present), None)
    if file is None:
        return groups
    rows = csv.DictReader(io.StringIO(read_text(join(root, file), "expected CSV with columns name and group"), newline=""))
    fields = rows.fieldnames or []
    column = next((c for c in GROUP_COLUMNS if c in fields), None)
    if "name" not in fields or column is None:
        raise DataError(f"{root}/{file}: has columns {some(fields, 20) or 'none'}; expected name and one of {', '.join(GROUP_COLUMNS)}")
    groups.update({row["name"]: row[column] or "" for row in rows})
    return groups
