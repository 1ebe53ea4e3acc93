"""Where images were taken, as far as a manifest or their folders tell: what the class map's columns are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysal.archive.tables import read_schema, scan_table
from raysal.errors import InputError
from raysal.stream.output import keys

Key = int | str | tuple[int, int]
"""A sol, a folder or group, or (site, drive), with drive -1 for all of a site."""

MOST_PLACES = 4096
"""Places that sums are kept for; neighbours become one where there are more."""

MOST_COLUMNS = 48
BATCH_ROWS = 65_536
NOWHERE = np.iinfo(np.int64).min
LONGEST_NAME = 22


def _coarser_sol(sol: Key, level: int) -> Key:
    assert isinstance(sol, int)
    return sol >> level << level


def _coarser_drive(place: Key, level: int) -> Key:
    assert isinstance(place, tuple)
    return (place[0] >> max(0, level - 1) << max(0, level - 1), -1) if level else place


def _coarser_folder(folder: Key, level: int) -> Key:
    return "/".join(str(folder).split("/")[: max(1, 64 - level)])


def _coarser_group(group: Key, level: int) -> Key:
    return str(group)[: max(0, 64 - level)] if level else group


COARSER: dict[str, Callable[[Key, int], Key]] = {
    "sol": _coarser_sol,
    "site and drive": _coarser_drive,
    "group": _coarser_group,
    "folder": _coarser_folder,
}
"""By kind of place: the larger one at a level that it is part of. Level 0 is the place itself; a level of a level is the higher one."""

COLUMNS = {"sol": ("sol",), "site and drive": ("site", "drive"), "group": ("group",)}
"""Columns of a manifest that tell each kind, in the order in which they are looked for."""


@dataclass(frozen=True)
class Places:
    """Says where the images of a batch were taken.

    Attributes:
        kind: A key of `COARSER`.
        ids: uint64 [n], hashes of the manifest's ids in order; 16 bytes an image together with `places`. Empty without a manifest.
        places: int64 [n], coded as `kind` says; NOWHERE where the manifest does not tell.
        names: Texts of the codes, for groups.
    """

    kind: str = "folder"
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    places: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    names: tuple[str, ...] = ()

    def of(self, batch: pa.RecordBatch) -> tuple[np.ndarray, list[Key | None]]:
        """Place of each row of a batch with columns id and uri: a number int64 [n], and what the numbers stand for."""
        if self.kind == "folder":
            folders = pc.replace_substring_regex(pc.fill_null(batch["uri"], ""), r"/?[^/]*$", "").dictionary_encode()
            return folders.indices.to_numpy(), folders.dictionary.to_pylist()
        wanted = keys(batch["id"])
        at = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        codes, numbers = np.unique(np.where(self.ids[at] == wanted, self.places[at], NOWHERE), return_inverse=True)
        return numbers, [None if code == NOWHERE else self._key(int(code)) for code in codes]

    def _key(self, code: int) -> Key:
        if self.kind == "sol":
            return code
        return (code >> 32, code & 0xFFFFFFFF) if self.kind == "site and drive" else self.names[code]


def from_manifest(uri: str) -> Places | None:
    """The places of a manifest's images, by the first of sol, site and drive, or group that it tells; None where it tells none.

    Raises:
        InputError: There is no manifest, or it has no ids.
    """
    there = read_schema(uri).names
    if "id" not in there:
        raise InputError(f"{uri}: has no column id, but {', '.join(there)}; give the manifest that the images came from")
    kind = next((k for k, columns in COLUMNS.items() if {*columns} <= {*there} and _told(uri, columns)), None)
    if kind is None:
        return None
    names: dict[str, int] = {}
    parts = [(keys(b["id"]), _codes(kind, b, names)) for b in scan_table(uri, ["id", *COLUMNS[kind]], BATCH_ROWS)]
    ids, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(ids, kind="stable")
    return Places(kind, ids[order], places[order], tuple(names))


def _told(uri: str, columns: Sequence[str]) -> bool:
    """Whether any row says anything in these columns."""
    for batch in scan_table(uri, columns, BATCH_ROWS):
        said = pc.is_valid(batch[columns[0]]) if columns != ("group",) else pc.greater(pc.utf8_length(batch["group"]), 0)
        if pc.any(said).as_py():
            return True
    return False


def _codes(kind: str, batch: pa.RecordBatch, names: dict[str, int]) -> np.ndarray:
    """int64 [n]; a group's number is its place in `names`, which grows."""
    if kind == "group":
        found = [names.setdefault(group, len(names)) if group else NOWHERE for group in batch["group"].to_pylist()]
        return np.array(found, np.int64)
    first, *second = (pc.fill_null(batch[c].cast(pa.int64()), NOWHERE).to_numpy(zero_copy_only=False) for c in COLUMNS[kind])
    if not second:
        return first
    return np.where(first == NOWHERE, NOWHERE, first << 32 | np.maximum(second[0], 0))


class Groups:
    """Sums of class shares by place: at most MOST_PLACES of them, whatever order they come in.

    Attributes:
        sums: (images, float64 [C]) by place; None where it is not known.
    """

    def __init__(self, kind: str, n_classes: int) -> None:
        self.kind, self._level = kind, 0
        self.sums: dict[Key | None, tuple[int, np.ndarray]] = {}
        self._n_classes = n_classes

    def add(self, numbers: np.ndarray, names: Sequence[Key | None], fractions_NC: np.ndarray) -> None:
        """Adds images: number int [N] of the place of each, the places by number, and class shares float [N, C]."""
        there, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
        sums = np.zeros((len(there), self._n_classes))
        np.add.at(sums, inverse, fractions_NC)
        for number, count, row in zip(there.tolist(), counts.tolist(), sums, strict=True):
            self._put(self._coarse(names[number]), count, row)
        while len(self.sums) > MOST_PLACES:
            self._level += 1
            before, self.sums = self.sums, {}
            for key, (count, row) in before.items():
                self._put(self._coarse(key), count, row)

    def _coarse(self, key: Key | None) -> Key | None:
        return None if key is None else COARSER[self.kind](key, self._level)

    def _put(self, key: Key | None, count: int, row: np.ndarray) -> None:
        n, total = self.sums.get(key, (0, np.zeros(self._n_classes)))
        self.sums[key] = n + count, total + row


@dataclass(frozen=True)
class Map:
    """Mean class shares by place, for a figure.

    Attributes:
        kind: Of place.
        labels: What the columns are called.
        counts: int64 [G] images.
        shares: float64 [G, C]; NaN in columns without images.
        unknown: Images whose place is not known.
        places: How many there are behind the columns.
    """

    kind: str
    labels: tuple[str, ...]
    counts: np.ndarray
    shares: np.ndarray
    unknown: int
    places: int


def class_map(groups: Groups) -> Map | None:
    """The columns of the class map, few enough to be read; None where no image's place is known."""
    known = {key: value for key, value in groups.sums.items() if key is not None}
    if not known:
        return None
    unknown = groups.sums[None][0] if None in groups.sums else 0
    sols = {key: value for key, value in known.items() if isinstance(key, int)}
    columns = _by_sol(sols) if groups.kind == "sol" else _by_name(known)
    counts = np.array([count for count, _ in columns.values()], np.int64)
    sums = np.stack([row for _, row in columns.values()])
    shares = np.divide(sums, counts[:, None], out=np.full(sums.shape, np.nan), where=counts[:, None] > 0)
    return Map(groups.kind, tuple(columns), counts, shares, unknown, len(known))


Columns = dict[str, tuple[int, np.ndarray]]


def _by_sol(sols: dict[int, tuple[int, np.ndarray]]) -> Columns:
    """A column a sol where they are few, else columns of equally many sols, so that time runs evenly; some may be empty."""
    if len(sols) <= MOST_COLUMNS:
        return {str(sol): sols[sol] for sol in sorted(sols)}
    low, high = min(sols), max(sols)
    steps = (step * 10**power for power in range(10) for step in (1, 2, 5))
    width = next(step for step in steps if high // step - low // step < MOST_COLUMNS)
    nothing = np.zeros_like(next(iter(sols.values()))[1])
    names = {at: f"{at * width}–{at * width + width - 1}" for at in range(low // width, high // width + 1)}
    columns: Columns = {name: (0, nothing) for name in names.values()}
    for sol, (count, row) in sols.items():
        columns[names[sol // width]] = _sum(columns[names[sol // width]], (count, row))
    return columns


def _by_name(places: dict[Key, tuple[int, np.ndarray]]) -> Columns:
    """The places with most images in the order of their names, and all others as one."""
    kept = sorted(places, key=lambda key: (-places[key][0], key))
    if len(kept) > MOST_COLUMNS:
        kept = kept[: MOST_COLUMNS - 1]
    names = dict(zip(sorted(kept), _short([_name(key) for key in sorted(kept)]), strict=True))
    columns: Columns = {name: places[key] for key, name in names.items()}
    others = [value for key, value in places.items() if key not in names]
    if others:
        total = others[0]
        for value in others[1:]:
            total = _sum(total, value)
        columns[f"{len(others)} others"] = total
    return columns


def _sum(a: tuple[int, np.ndarray], b: tuple[int, np.ndarray]) -> tuple[int, np.ndarray]:
    return a[0] + b[0], a[1] + b[1]


def _name(key: Key) -> str:
    if isinstance(key, tuple):
        return f"{key[0]}/{key[1]}" if key[1] >= 0 else f"{key[0]}"
    return str(key)


def _short(names: list[str]) -> list[str]:
    """Names without the folders that all share, cut at the front, and no two alike."""
    common = 0
    split = [name.split("/") for name in names]
    while len({tuple(parts[: common + 1]) for parts in split}) == 1 and all(len(parts) > common + 1 for parts in split):
        common += 1
    found: list[str] = []
    for parts in split:
        name = "/".join(parts[common:]) or "/"
        name = name if len(name) <= LONGEST_NAME else f"…{name[-LONGEST_NAME + 1 :]}"
        found.append(name if name not in found else f"{name} ({len(found) + 1})")
    return found
