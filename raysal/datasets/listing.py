"""What the readers share: the root folder, one listing a folder, label sets, split files, groups from product names."""

from __future__ import annotations

import difflib
import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence

from raysal.archive.uris import absolute, exists, join, list_names, read_bytes
from raysal.config import DataConfig
from raysal.errors import DataError
from raysal.labels import LABEL_SETS, LabelSet

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".tif", ".tiff")

NAVCAM = re.compile(r"[A-Z]{2}[A-Z]_\d{9}[A-Z]{3}[A-Z_][A-Z]([0-9A-Z]{3})([0-9A-Z]{4})")
"""MSL engineering cameras, for example NLB_527820640EDR_F0580000NCAM00253M1: full frame, site 058, drive 0000."""
MASTCAM = re.compile(r"(\d{4})M[LRHD]\d{6}")
"""MSL science cameras, for example 0001ML0000001000C0_DXXX: sol 1, Mastcam left. Their names tell neither site nor drive."""


def root_of(config: DataConfig) -> tuple[str, list[str]]:
    """The absolute root and the names in it.

    Raises:
        DataError: No root given, nothing there, a file instead of a folder, or a store that refuses.
    """
    if not config.root:
        raise DataError(f"data.reader {config.reader!r} reads files; set data.root to the folder or URI that holds them")
    root = absolute(config.root)
    names = names_in(root)
    if names == [posixpath.basename(root.rstrip("/"))] and not names_in(join(root, names[0])):
        raise DataError(f"data.root {root}: is a file; unpack it and give the folder")
    if not names:
        seen = "is empty" if exists(root) else "there is no such folder"
        raise DataError(f"data.root {root}: {seen}; give the folder that holds the data set")
    return root, names


def names_in(uri: str) -> list[str]:
    """Sorted names under a folder without hidden ones, from one listing; empty where there is no such folder.

    Raises:
        RaysalError: The store refuses (rights, credentials, network).
    """
    return [n for n in list_names(uri) if not n.startswith(".")]


def files_by_stem(folder: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, str]:
    """URI of each file of a folder by its name without suffix, sorted; empty where there is no such folder.

    Raises:
        DataError: Two files share a stem.
    """
    files: dict[str, str] = {}
    for name in names_in(folder):
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() not in suffixes:
            continue
        if stem in files:
            raise DataError(f"{folder}: {posixpath.basename(files[stem])} and {name} are both called {stem!r}; keep one of them")
        files[stem] = join(folder, name)
    return files


def label_set_of(config: DataConfig, default: LabelSet | None, default_uri: str | None = None) -> LabelSet:
    """The label set of a data set: ``data.label_set`` by name or JSON file, else the reader's own.

    Raises:
        DataError: An unknown name, no such file, or a file that is no label set.
    """
    name = config.label_set
    if name is None and default is not None:
        return default
    if name in LABEL_SETS:
        return LABEL_SETS[name]
    uri = name or default_uri or ""
    if name and not name.endswith(".json"):
        near = difflib.get_close_matches(name, LABEL_SETS, 1)
        meant = f"did you mean {near[0]!r}?" if near else f"give {', '.join(LABEL_SETS)} or a .json file"
        raise DataError(f"data.label_set {name!r} is not known; {meant}")
    text = read_text(uri, "write the classes there, or set data.label_set to s5mars, ai4mars, marsscapes or a JSON file")
    try:
        return LabelSet.from_json(text, posixpath.basename(posixpath.dirname(absolute(uri))) or "custom")
    except DataError as error:
        raise DataError(f"{uri}: {error}") from error


def read_text(uri: str, fix: str) -> str:
    """A small UTF-8 file. Raises DataError naming it and the fix where it can't be read."""
    try:
        return read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{uri}: there is no such file; {fix}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: is not UTF-8 text ({error.reason} at byte {error.start}); {fix}") from error
    except OSError as error:
        raise DataError(f"{uri}: can't be read ({type(error).__name__}: {error}); check rights, credentials and network") from error


def read_json(uri: str, fix: str) -> object:
    """A small JSON file. Raises DataError naming it and the fix where it can't be read."""
    try:
        return json.loads(read_text(uri, fix))
    except ValueError as error:
        raise DataError(f"{uri}: is not JSON ({error}); {fix}") from error


def split_names(raw: object, uri: str) -> list[str]:
    """Checks one list of image names; suffixes of image files are taken off.

    Raises:
        DataError: Not a list of strings, or a name twice.
    """
    if not isinstance(raw, list) or not all(isinstance(n, str) for n in raw):
        raise DataError(f'{uri}: expected a list of image names such as ["sol0122_1", "sol0122_2"]')
    names = [n[: -len(posixpath.splitext(n)[1])] if posixpath.splitext(n)[1].lower() in IMAGE_SUFFIXES else n for n in raw]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise DataError(f"{uri}: names {twice!r} twice in one split; keep one")
    return names


def some(names: Iterable[str], limit: int = 5) -> str:
    """``a, b, c and 7 more``"""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def stable_order(names: Iterable[str], seed: int = 0) -> list[str]:
    """A shuffle that depends on the names and the seed alone: adding names does not reorder the others."""

    def key(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()

    return sorted(names, key=lambda name: (key(name), name))


def group_of(stem: str) -> str:
    """``site/drive`` or ``sol`` of an MSL product name, empty where it tells neither.

    Images of one group overlap: stereo pairs, mosaics, repeats. A Mastcam name gives the sol only, so a stop of several sols
    is several groups.
    """
    if match := NAVCAM.match(stem):
        return f"{match[1]}/{match[2]}"
    if match := MASTCAM.match(stem):
        return f"sol{match[1]}"
    return ""


def hold_out(groups: Mapping[str, str], share: float, seed: int = 0) -> set[str]:
    """Names to hold out: whole groups in a seeded stable order, each taken where it still fits under the share.

    Args:
        groups: Group of each name; a name with an empty group is a group of its own.
        share: Share of the names to hold out.
        seed: Another seed is another draw.

    Returns:
        At least one name where there are two or more; the smallest group where none fits; single names where all are one group.
    """
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group or f"name {name}", []).append(name)
    if len(members) == 1:
        members = {name: [name] for name in groups}
    if len(members) < 2:
        return set()
    limit = share * len(groups)
    order = stable_order(members, seed)
    held: set[str] = set()
    for group in order:
        if len(held) + len(members[group]) <= limit:
            held.update(members[group])
    return held or set(members[min(order, key=lambda g: len(members[g]))])
