"""File names for images, from their URIs: readable, safe on every file system, no two alike, and the same on every run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator

from raysal.errors import InputError

LONGEST_PART = 120
"""Bytes of a folder's or file's name: with a suffix it stays under the 255 that file systems take."""

LONGEST_NAME = 700
"""Bytes of a whole name; of a longer path the last part is kept, with the image's id."""

RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)
ID, NAME = b"i", b"n"
"""First bytes of the keys that `Names` keeps: of ids, and of names."""
SUFFIXED = re.compile(r"~[0-9a-f]{32}$")


class Names:
    """Names for the images of one export.

    A name is the image's path below the folder that all of them share, without its extension: ``sol0012/a`` for
    ``s3://mars/msl/sol0012/a.jpg``. Where two images would get one name (``a.jpg`` beside ``a.png``, ``A.jpg`` beside ``a.jpg``,
    two stores with equal paths), each of them carries its id behind a ``~``. So a name depends on the images, not on their order.

    Every image is shown to `see` first; then `of` gives names. What was seen is kept in a temporary database that spills to
    disk, so memory does not grow.

    Args:
        extension: Keep extensions, for formats that list the images themselves.
        below: The folder to count from; None takes the deepest that all images share.
    """

    def __init__(self, extension: bool, below: str | None = None) -> None:
        self.extension = extension
        self.below = None if below is None else parts_of(below)
        self._given = below
        self._shared: list[str] | None = None
        self._seen = temporary_database("seen (key BLOB PRIMARY KEY, n INTEGER NOT NULL)")

    def __enter__(self) -> Names:
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.close()

    def see(self, images: Iterable[tuple[str, str]]) -> None:
        """Takes note of images, as (id, uri).

        Raises:
            InputError: One does not lie below the folder that was given, or there is no temporary space.
        """
        keys = []
        for id_, uri in images:
            folders = parts_of(uri)[:-1]
            if self._shared is None:
                self._shared = folders
            self._shared = self._shared[: _equal(self._shared, folders)]
            if self.below is not None and folders[: len(self.below)] != self.below:
                raise InputError(f"{uri} does not lie below {self._given}; name a folder that holds all images, or leave it out")
            keys += [(_digest(ID, id_),), (self._key(uri),)]
        with database_errors():
            self._seen.executemany("INSERT INTO seen VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET n = n + 1", keys)

    def repeated_ids(self) -> int:
        """How many ids were seen more than once."""
        with database_errors():
            found = self._seen.execute("SELECT count(*) FROM seen WHERE n > 1 AND key BETWEEN ? AND ?", (ID, NAME)).fetchone()
        return int(found[0])

    def below_root(self, uri: str) -> list[str]:
        """The parts of an image's path below the shared folder, as they are in the URI."""
        root = self._shared if self.below is None else self.below
        return parts_of(uri)[len(root or []) :]

    def of(self, id_: str, uri: str) -> str:
        """The name of an image that was seen, with forward slashes."""
        name, extension = _safe(self.below_root(uri))
        long = len(name.encode()) > LONGEST_NAME
        if long:
            name = posixpath.basename(name)
        if long or self._count(self._key(uri)) > 1 or SUFFIXED.search(name):
            name = f"{name}~{id_ if re.fullmatch('[0-9a-f]{32}', id_) else hashlib.sha256(id_.encode()).hexdigest()[:32]}"
        return name + extension if self.extension else name

    def _key(self, uri: str) -> bytes:
        """What names that would meet in one file have in common, on file systems that ignore case or form of letters too."""
        name, extension = _safe(parts_of(uri))
        return _digest(NAME, unicodedata.normalize("NFC", name + extension if self.extension else name).casefold())

    def _count(self, key: bytes) -> int:
        with database_errors():
            found = self._seen.execute("SELECT n FROM seen WHERE key = ?", (key,)).fetchone()
        return found[0] if found else 0


def parts_of(uri: str) -> list[str]:
    """Folders and file of a URI: the scheme, a web address's query, ``.`` and ``..`` are gone."""
    scheme, colon, rest = uri.partition("://")
    if not colon:
        scheme, rest = "", uri
    if scheme in ("http", "https"):
        rest = re.split("[?#]", rest)[0]
    return [part for part in posixpath.normpath(rest).split("/") if part not in ("", ".", "..")]


def _safe(parts: list[str]) -> tuple[str, str]:
    """A path that is no trap on any system, and the extension of its file."""
    *folders, file = parts or ["_"]
    stem, extension = os.path.splitext(file)
    kept = [_part(folder) for folder in folders] + [_part(stem)]
    # A folder x.png would lie where the mask of an image x belongs.
    kept[:-1] = [f"{folder}_" if folder.lower().endswith(".png") else folder for folder in kept[:-1]]
    return "/".join(kept), "." + _part(extension[1:]) if len(extension) > 1 else ""


def _part(text: str) -> str:
    """One folder or file name without what some system or list format reads as something else."""
    safe = "".join("_" if c in '\\:*?"<>|/' or unicodedata.category(c) in UNSEEN else c for c in text)
    if safe[:1] in (".", "#") or safe[:1].isspace():  # hidden files, comments, blanks that lists drop
        safe = "_" + safe[1:]
    if safe[-1:] == "." or safe[-1:].isspace():
        safe = safe[:-1] + "_"
    if RESERVED.match(safe):
        safe = "_" + safe
    if len(safe.encode()) > LONGEST_PART:
        safe = f"{safe.encode()[:LONGEST_PART].decode(errors='ignore')}~{hashlib.sha256(safe.encode()).hexdigest()[:8]}"
    return safe or "_"


UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of what prints nothing or breaks a line."""


def _equal(a: list[str], b: list[str]) -> int:
    """How many leading parts two paths share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _digest(kind: bytes, text: str) -> bytes:
    return kind + hashlib.blake2b(text.encode(), digest_size=16).digest()


def temporary_database(table: str) -> sqlite3.Connection:
    """One with one table, in a file of the operating system's temporary folder that is gone with the process."""
    database = sqlite3.connect("")
    database.execute("PRAGMA journal_mode=OFF")
    database.execute(f"CREATE TABLE {table} WITHOUT ROWID")
    return database


@contextlib.contextmanager
def database_errors() -> Iterator[None]:
    """Turns a full disk under a temporary database into an error that says so."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise InputError(f"temporary files: {error}; free some space there, or name another place in TMPDIR") from error
