"""Lists of URIs as archives: text with one a line, CSV, Parquet. An entry is taken as it stands; what can't be a URI is noted."""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import pyarrow.parquet as pq

from raysal.archive.entries import Entry, Tally, size_of, utc
from raysal.archive.uris import canonical
from raysal.errors import InputError

LONGEST_LINE = 65_536
"""Bytes; nothing longer is a URI."""
KNOWN = ("size", "etag", "modified")
"""Columns that a list may have beside ``uri``, as a manifest has them."""
BATCH = 8192
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and bytes that are no UTF-8."""


def list_entries(fs: Any, path: str, uri: str, tally: Tally) -> Iterator[Entry]:
    """The entries of a list, read in batches.

    Of local files the disk tells size and time. Of others the list's own columns ``size``, ``etag`` and ``modified`` do, where it
    has them: no store is asked. Relative entries start from the list's folder.

    Args:
        fs, path: The list's file.
        uri: Its canonical URI.
        tally: Gets what is no URI and what is missing.

    Raises:
        InputError: It is no such list, or can't be read.
    """
    base = posixpath.dirname(uri)
    rows = LISTS[posixpath.splitext(uri)[1].lower()]
    try:
        with fs.open(path, "rb") as file:
            for where, row in rows(file, uri):
                if (entry := _entry(row, base, f"{uri}:{where}", tally)) is not None:
                    yield entry
    except InputError:
        raise
    except Exception as error:  # drivers raise their own types; every one means that the list can't be read
        raise InputError(f"{uri}: can't be read as a list of URIs ({error}); give text, CSV or Parquet with a column uri") from error


def _entry(row: dict[str, Any], base: str, where: str, tally: Tally) -> Entry | None:
    tally.files += 1
    given = row["uri"]
    text = given.strip(" \t") if isinstance(given, str) else ""
    if not text or NO_TEXT.search(text):
        tally.fail(where, f"{text[:80]!r} is no URI" if text else "no URI")
        return None
    try:
        uri = canonical(text, base)
    except InputError as error:
        tally.fail(where, str(error))
        return None
    if uri.startswith("/"):
        try:
            about = os.stat(uri)
            return Entry(uri, about.st_size, None, utc(about.st_mtime))
        except (OSError, ValueError):  # stays an entry: fetching it will tell why
            tally.missing += 1
            return Entry(uri)
    etag = row.get("etag")
    return Entry(uri, size_of(row.get("size")), str(etag) if etag else None, utc(row.get("modified")))


def _lines(file: Any) -> Iterator[tuple[int, str]]:
    """Numbered lines; of one that is too long only the beginning, so that no file is ever held whole."""
    for number in count(1):
        line = file.readline(LONGEST_LINE)
        if not line:
            return
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").rstrip("\r\n")
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            text = f"{text[:80]}\0"  # no URI, and said to be none
        yield number, text


def _text(file: Any, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(file):
        if line.strip() and not line.startswith("#"):
            yield number, {"uri": line}


def _csv(file: Any, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line by itself, so that a stray quotation mark costs its own line and not the rest of the file."""
    columns: list[str] | None = None
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            cells = next(csv.reader([line]))
        except (csv.Error, StopIteration):
            cells = [line]
        if columns is None:
            head = [cell.strip().lower() for cell in cells]
            if "uri" in head:
                columns = head
                continue
            if len(head) > 1:
                raise InputError(f"{uri}: no column uri in {', '.join(head[:8])}; name the column of URIs uri, or give that one alone")
            columns = ["uri"]
        if columns == ["uri"] and len(cells) > 1:  # a comma in a name, not quoted as there is nothing to tell apart
            cells = [line]
        row: dict[str, Any] = dict(zip(columns, cells, strict=False)) if len(cells) <= len(columns) else {}
        yield number, {"uri": None, **row}


def _parquet(file: Any, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    table = pq.ParquetFile(file)
    if "uri" not in table.schema_arrow.names:
        raise InputError(f"{uri}: no column uri in {', '.join(table.schema_arrow.names[:8])}; name the column of URIs uri")
    number = 0
    for batch in table.iter_batches(BATCH, columns=["uri", *(c for c in KNOWN if c in table.schema_arrow.names)]):
        for row in batch.to_pylist():
            number += 1
            yield number, row


LISTS = {".txt": _text, ".csv": _csv, ".parquet": _parquet}
"""Readers by suffix."""
