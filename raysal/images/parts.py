"""How many parts a picture's file has, counted before pillow reads them one by one: a few bytes each can keep it busy for a minute."""

from __future__ import annotations

import struct

from PIL import JpegImagePlugin

from raysal.errors import ImageError

MAX_SCANS = 50
"""Of a progressive JPEG; real ones have about ten. Each is a pass over all pixels, and a hostile one costs few bytes."""

MAX_SEGMENTS = 10_000
"""Of a JPEG before its first scan; bytes between them count as well. Real ones have tens, or a few hundred with long metadata."""

MAX_CHUNKS, CHUNK_BYTES = 10_000, 1024
"""Chunks of a PNG: so many, and one more for each so many bytes of the file. Encoders write chunks of 8 kB or more."""

MAX_STRIPS = 2**18
"""Strips or tiles of a TIFF. An image of 60,000 lines may have one a line, in each of four bands."""

STRIPS = (273, 324)
"""Tags of a TIFF that list where its strips and its tiles are."""


def check_parts(data: bytes, name: str) -> None:
    """Refuses a JPEG, PNG or TIFF of more parts than real ones have; other bytes pass.

    Raises:
        ImageError: ``limit``.
    """
    if data.startswith(b"\xff\xd8\xff"):
        if (scans := data.count(b"\xff\xda")) > MAX_SCANS:
            raise ImageError("limit", f"{name}: a JPEG of {scans} scans, over {MAX_SCANS}; save it again with fewer")
        found, most, kind = _segments(data), MAX_SEGMENTS, "JPEG of more than {} segments"
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        most = MAX_CHUNKS + len(data) // CHUNK_BYTES
        found, kind = _chunks(data, most), "PNG of more than {} chunks"
    elif data.startswith((b"II", b"MM")):
        found, most, kind = _strips(data), MAX_STRIPS, "TIFF of more than {} strips or tiles"
    else:
        return
    if found > most:
        raise ImageError("limit", f"{name}: a {kind.format(most)}; save it again")


def _segments(data: bytes) -> int:
    """Steps that a reader takes to the first scan, at most one more than are allowed."""
    at, steps = 2, 0
    while steps <= MAX_SEGMENTS and at + 4 <= len(data) and data[at : at + 2] != b"\xff\xda":
        marker, length = struct.unpack_from(">HH", data, at)
        skips = JpegImagePlugin.MARKER.get(marker, ("", "", None))[2] is not None
        at += 2 + max(2, length) if skips else 1  # what is no segment is looked at byte by byte
        steps += 1
    return steps


def _chunks(data: bytes, most: int) -> int:
    """Chunks, at most one more than are allowed."""
    at, n = 8, 0
    while n <= most and at + 4 <= len(data):
        at += 12 + struct.unpack_from(">I", data, at)[0]
        n += 1
    return n


def _strips(data: bytes) -> int:
    """Strips or tiles that the first directory lists; 0 where there is none."""
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    head, count, entry = ("8xQ", "Q", "HHQ8x") if big else ("4xL", "H", "HHL4x")
    try:
        (at,) = struct.unpack_from(order + head, data)
        (n,) = struct.unpack_from(order + count, data, at)
        start, size = at + struct.calcsize("=" + count), struct.calcsize("=" + entry)
        entries = (struct.unpack_from(order + entry, data, start + k * size) for k in range(min(n, 2**16)))
        return max((values for tag, _, values in entries if tag in STRIPS), default=0)
    except struct.error:  # cut off, which pillow will say
        return 0
