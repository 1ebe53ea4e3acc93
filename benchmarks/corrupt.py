"""Labeling an archive in which every twentieth file is damaged, against one that is whole.

    python benchmarks/corrupt.py

Damaged files are of every kind that archives hold: cut short, empty, another format under the name, a header that promises gigabytes,
gone. Runs alternate; images per second count all images of the manifest, start-up included.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from common import Claim, median_ratio, options, write
from parts.scenes import ENCODER, manifest, scenes, untrained

from raysal.cluster import connected
from raysal.config import build
from raysal.stream.label import label_pool


def bomb(_: bytes) -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + b"\0" * 64


DAMAGE: tuple[Callable[[bytes], bytes | None], ...] = (
    lambda whole: whole[: len(whole) // 2],
    lambda whole: b"",
    lambda whole: b"<html><body>404 Not Found</body></html>",
    lambda whole: whole[:200] + bytes(b ^ 0x5A for b in whole[200:]),
    bomb,
    lambda whole: None,
)


def damaged(uris: list[str], folder: Path) -> list[str]:
    """The same images, every twentieth replaced by a damaged copy; None leaves a name without a file."""
    folder.mkdir()
    out = list(uris)
    for n, place in enumerate(range(7, len(uris), 20)):
        file, broken = folder / Path(uris[place]).name, DAMAGE[n % len(DAMAGE)](Path(uris[place]).read_bytes())
        if broken is not None:
            file.write_bytes(broken)
        out[place] = str(file)
    return out


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    count, pairs = (60, 1) if args.quick else (args.count, args.pairs)
    seconds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch, cfg = Path(name), build({"model": {"encoder": ENCODER}})
        uris = scenes(scratch / "archive", count, 128)
        clean = manifest(scratch / "clean.parquet", uris)
        bad = manifest(scratch / "bad.parquet", damaged(uris, scratch / "damaged"))
        checkpoint = untrained(scratch / "checkpoint", 128)
        with connected(cfg.compute):
            for i in range(pairs):
                whole = label_pool(clean, checkpoint, str(scratch / f"whole{i}"), cfg)
                some = label_pool(bad, checkpoint, str(scratch / f"bad{i}"), cfg)
                failed = some.rows - some.counts["ok"]
                assert (whole.counts["ok"], failed) == (count, len(range(7, count, 20)))
                seconds.append((whole.seconds, some.seconds))
    ratio = median_ratio([a for a, _ in seconds], [b for _, b in seconds])
    claims = [Claim("labeling with 5% damaged files / without, images per second", ratio, 0.95, "higher", "x")]
    speeds = ", ".join(f"({count / a:.1f}, {count / b:.1f})" for a, b in seconds)
    notes = f"{count} scenes of 128 px, {ENCODER}. Every damaged file became a row. Images per second (whole, damaged): {speeds}."
    write("corrupt", "Labeling with damaged files", claims, args.out, notes)


if __name__ == "__main__":
    main()
