"""Bytes of single images, from stores that drip, hang, refuse or are busy: whole, in time, and within limits."""

from __future__ import annotations

import asyncio
import os
import posixpath
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from raysal.archive.uris import open_fs
from raysal.errors import ImageError

PIECE = 2**20
"""Bytes that are read from a store at once."""

BUSY, PAUSES = (429, 500, 502, 503, 504), (0.5, 1.0, 2.0)
"""Answers of a web server that another try may change, and the seconds before each."""

Answer = TypeVar("Answer")

PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
"""Suffixes of files that have no label beside them."""


def fetch_image(uri: str, max_bytes: int, max_seconds: float = 120.0) -> bytes:
    """The bytes of one image of an archive.

    A store that stops answering is given up after max_seconds where its driver can be interrupted (HTTP, S3 and the other asynchronous
    ones); elsewhere the clock is looked at between pieces.

    Raises:
        ImageError: status ``limit`` where the file is larger than max_bytes, ``fetch`` where it can't be had, or not in time.
    """
    deadline = time.monotonic() + max_seconds
    try:
        fs, path = open_fs(uri)

        def read() -> bytes:
            left = deadline - time.monotonic()
            if isinstance(fs, AsyncFileSystem) and fs.async_impl and not fs.asynchronous:
                data: bytes = fsspec.asyn.sync(fs.loop, _read_async, fs, path, max_bytes + 1, timeout=left)
                return data
            return _read_pieces(fs, path, max_bytes + 1, deadline)

        data = patiently(read, deadline)
    except (TimeoutError, asyncio.TimeoutError) as error:  # fsspec's own is one, too
        slow = f"{uri}: not there after {max_seconds:g} s; is the store slow? Raise data.max_seconds, or retry the failed images later"
        raise ImageError("fetch", slow) from error
    except Exception as error:  # drivers raise their own types; every one means that the bytes are not to be had
        raise ImageError("fetch", f"{uri}: {type(error).__name__}: {error}") from error
    if len(data) > max_bytes:
        raise ImageError("limit", f"{uri}: more than {max_bytes} bytes; raise data.max_bytes if such files are wanted")
    return data


def fetch_label(uri: str, max_bytes: int = 2**20, max_seconds: float = 120.0, allowed: Callable[[str], str] = str) -> bytes | None:
    """The detached label beside an archive product's data file (``.xml``, ``.lbl``, of the same name), or None.

    Args:
        uri: Of the data file.
        max_bytes, max_seconds: As in `fetch_image`.
        allowed: Where a label's URI leads; raises where that may not be read.

    Raises:
        ImageError: As `fetch_image`, where there is one that can't be had.
    """
    inner, chained, outer = uri.partition("::")
    stem, own = posixpath.splitext(inner)
    if own.lower() in PICTURES:
        return None
    # A store that may not be listed answers 403, not 404, for what is not there.
    absent = (FileNotFoundError, PermissionError)
    for suffix in (".xml", ".LBL", ".lbl", ".XML"):
        beside = f"{stem}{suffix}{chained}{outer}"
        try:
            return fetch_image(allowed(beside), max_bytes, max_seconds)
        except ImageError as error:
            if error.__cause__ is None or not (isinstance(error.__cause__, absent) or status_of(error.__cause__) == 403):
                raise
    return None


def patiently(ask: Callable[[], Answer], deadline: float) -> Answer:
    """Asks a store, and again a little later where it was busy (`BUSY`); not after a time of `time.monotonic`."""
    for wait in PAUSES:
        try:
            return ask()
        except Exception as error:
            if status_of(error) not in BUSY or time.monotonic() + wait > deadline:
                raise
        time.sleep(wait)
    return ask()


def status_of(error: BaseException) -> int | None:
    """What a web server answered; drivers tell of any answer as of a missing file, with the answer as its cause."""
    status: int | None = getattr(error, "status", None)
    return status if status is not None or error.__cause__ is None else status_of(error.__cause__)


async def _read_async(fs: Any, path: str, n_bytes: int) -> bytes:
    """At most so many bytes of a file; what more there is stays where it is."""
    if type(fs).open_async is AsyncFileSystem.open_async:  # which only raises; drivers of Google and Azure read ranges instead
        return bytes(await fs._cat_file(path, start=0, end=n_bytes))
    file = await fs.open_async(path, "rb")
    data = bytearray()
    try:
        while len(data) < n_bytes and (piece := await file.read(min(PIECE, n_bytes - len(data)))):
            data += piece
    finally:
        await file.close()
    return bytes(data)


def _read_pieces(fs: fsspec.AbstractFileSystem, path: str, n_bytes: int, deadline: float) -> bytes:
    """As `_read_async`. Raises TimeoutError where the clock runs out between two pieces."""
    data = bytearray()
    if isinstance(fs, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise OSError("no file: a folder, a pipe or a device")  # opening a pipe would wait for ever
    with fs.open(path, "rb") as file:
        while len(data) < n_bytes and (piece := file.read(min(PIECE, n_bytes - len(data)))):
            data += piece
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(data)
