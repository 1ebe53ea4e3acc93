"""What a listing yields: image files as their store tells of them, and what was met besides."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".img", ".vic")
LABELS = (".lbl", ".xml")
"""Detached PDS3 and PDS4 labels: never images themselves."""
LABELED = (".raw", ".dat")
"""Images where a PDS4 label of the same name lies beside them, else anything."""
TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest")
TIMES = ("mtime", "LastModified", "last_modified", "updated", "Last-Modified", "created", "date")
"""Names that drivers use for the tag of a content, and for its time."""
EXAMPLES = 20
"""Of what could not be read, kept for messages."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file as its store tells of it.

    Attributes:
        uri: Canonical.
        size: Bytes; None where nobody says.
        etag: The store's tag of the content, or a checksum; None without.
        modified: UTC; None where nobody says.
    """

    uri: str
    size: int | None = None
    etag: str | None = None
    modified: datetime | None = None


@dataclass
class Tally:
    """What a listing met besides images.

    Attributes:
        files: All files met, or entries of a list.
        labels, others: Detached labels; files that are no images.
        missing: Entries of a list that are not on this machine's disk although they should be; they are listed all the same.
        unreadable: Folders, files and lines of lists that could not be read.
        examples: The first of these, each as ``place: cause``.
    """

    files: int = 0
    labels: int = 0
    others: int = 0
    missing: int = 0
    unreadable: int = 0
    examples: list[str] = field(default_factory=list)

    def fail(self, where: str, cause: object) -> None:
        """Notes what could not be read."""
        self.unreadable += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{printable(where)}: {cause_of(cause)}")

    def is_image(self, name: str, labeled: Callable[[str], bool]) -> bool:
        """Counts a file, and says whether it is an image.

        Args:
            name: Its path or name.
            labeled: Tells whether a PDS4 label lies beside a file, from the path without suffix.
        """
        self.files += 1
        stem, suffix = posixpath.splitext(name)
        suffix = suffix.lower()
        if suffix in IMAGES or (suffix in LABELED and labeled(stem)):
            return True
        if suffix in LABELS:
            self.labels += 1
        else:
            self.others += 1
        return False


def entry_of(uri: str, info: dict[str, Any]) -> Entry:
    """What a store says of a file, under the names that the drivers use."""
    etag = next((str(info[k]) for k in TAGS if info.get(k)), None)
    if etag is None and info.get("crc") is not None:
        etag = f"{info['crc']:08x}"
    when = next((info[k] for k in TIMES if info.get(k)), None)
    return Entry(uri, size_of(info.get("size")), etag.strip('"') if etag else None, utc(when))


def size_of(said: Any) -> int | None:
    """Bytes, from what somebody says; None for what no file can have."""
    text = str(said)
    return int(text) if text.isdecimal() and int(text) < 2**63 else None


def utc(when: Any) -> datetime | None:
    """A time in UTC from what drivers give: seconds, a datetime, ISO or web text, the six numbers of zip; None for what is none."""
    try:
        if isinstance(when, (int, float)):
            return datetime.fromtimestamp(when, timezone.utc)
        if isinstance(when, tuple):
            when = datetime(*when)
        if isinstance(when, str):
            when = parsedate_to_datetime(when) if "," in when else datetime.fromisoformat(when.replace("Z", "+00:00"))
        if isinstance(when, datetime):
            return when.replace(tzinfo=timezone.utc) if when.tzinfo is None else when.astimezone(timezone.utc)
    except (ValueError, OverflowError, OSError, TypeError):
        pass
    return None


def printable(text: str) -> str:
    """Text that any terminal and JSON can show, also where a name is no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def cause_of(error: object) -> str:
    """One line of why something could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if (status := getattr(error, "status", None)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    if isinstance(error, FileNotFoundError):
        return "not found" if error.__cause__ is None else cause_of(error.__cause__)
    return " ".join(f"{type(error).__name__}: {error}".split()) if isinstance(error, Exception) else str(error)
