"""A manifest of a million rows: time a row and peak memory of indexing it, of indexing it again, and of planning a run over it.

    python benchmarks/manifest.py

The archive is a list of a million web addresses with product names of four missions, so that no disk or network is measured; listing real
stores comes on top. Each number is taken in a process of its own: memory is the peak of the whole process, the interpreter included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Claim, options, write

NAMES = (
    "sol/{sol:05d}/opgs/edr/ncam/NLB_{n:09d}EDR_F{site:03d}{drive:04d}NCAM00253M_.JPG",
    "sol/{sol:05d}/ids/edr/browse/zcam/ZL0_{sol:04d}_{n:010d}_463ECM_N{site:03d}{drive:04d}ZCAM08001_1100LMJ01.png",
    "msss/{sol:05d}/mcam/{sol:04d}MR0030170{n:09d}E01_DXXX.jpg",
    "sol{sol:04d}/2P{n:09d}EFF{site:02d}{drive:02d}P2356L2M1.JPG",
)


def write_list(path: Path, rows: int) -> None:
    """URIs as four rovers' public sites write them."""
    with path.open("w") as file:
        for n in range(rows):
            sol, site, drive = n // 250 % 9999, n // 20_000 % 99, n // 200 % 99
            file.write(f"https://host/{NAMES[n % len(NAMES)].format(n=n, sol=sol, site=site, drive=drive)}\n")


def peak_mb() -> float:
    """Of this process since it started."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(what: str, source: str, manifest: str) -> dict[str, float]:
    """One step, in this process. Returns seconds, peak megabytes and rows."""
    if what == "index":
        from raysal.archive.index import index

        start = time.perf_counter()
        rows = index([source], manifest).rows
    else:
        from raysal.stream.archive import open_manifest
        from raysal.stream.manifest import read

        start = time.perf_counter()
        rows = len(read(open_manifest(manifest))[1])
    return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb(), "rows": rows}


def apart(what: str, source: Path, manifest: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", what, str(source), str(manifest)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    if "--step" in sys.argv:
        print(json.dumps(measure(*sys.argv[-3:])))
        return
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    rows = 20_000 if args.quick else args.rows
    small = rows // 10
    steps: dict[tuple[str, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch_name:
        for count in (small, rows):
            source, manifest = Path(scratch_name) / f"{count}.txt", Path(scratch_name) / str(count)
            write_list(source, count)
            for step in ("index", "again", "plan"):
                steps[step, count] = apart("plan" if step == "plan" else "index", source, manifest)
                assert steps[step, count]["rows"] == count
        size = sum(p.stat().st_size for p in (Path(scratch_name) / str(rows)).iterdir()) / rows
    words = {"index": "indexing", "again": "indexing again with nothing new", "plan": "planning a run over"}
    claims = []
    for step, what in words.items():
        now, before = steps[step, rows], steps[step, small]
        ratio = now["peak_mb"] / before["peak_mb"]
        claims.append(Claim(f"{what} {rows:,} rows / {small:,} rows, peak memory", ratio, 1.3, "lower", "x"))
        claims.append(Claim(f"{what} {rows:,} rows, peak memory of the process", now["peak_mb"], None, "lower", "MB"))
        claims.append(Claim(f"{what} {rows:,} rows, time a row", 1e6 * now["seconds"] / rows, None, "lower", "us"))
    claims.append(Claim("size of the manifest on disk, a row", size, None, "lower", "bytes"))
    write("manifest", "A manifest of a million rows", claims, args.out)


if __name__ == "__main__":
    main()
