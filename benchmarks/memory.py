"""Peak memory of the driver and of the model actors, by the size of the archive.

    python benchmarks/memory.py

`raysal score` runs in a process of its own over manifests of 1,000 to 100,000 images (a hundred small scenes under as many names); resident
memory of the driver and of each actor is sampled ten times a second.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import Claim, options, write
from parts.scenes import ENCODER, manifest, scenes, untrained


def resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def is_actor(process: psutil.Process) -> bool:
    try:
        return "MapWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def peaks(arguments: list[str]) -> tuple[float, float]:
    """Largest resident MB of the command's driver, and of any actor."""
    process = subprocess.Popen([sys.executable, "-m", "raysal", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    driver, most, actors = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        most = max(most, resident(driver))
        try:
            family = driver.children(recursive=True)
        except psutil.Error:
            break
        actors = max([actors, *(resident(p) for p in family if is_actor(p))])
        time.sleep(0.1)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    return most / 2**20, actors / 2**20


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    args = parser.parse_args()
    sizes = [40, 80] if args.quick else args.sizes
    found = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        files = scenes(scratch / "archive", 100, 32)
        checkpoint = untrained(scratch / "checkpoint", 32)
        for size in sizes:
            place = manifest(scratch / f"{size}.parquet", [files[i % len(files)] for i in range(size)])
            settings = ["--set", "compute.in_process=0", "--set", "score.embedding_dim=16"]
            found[size] = peaks(["score", checkpoint, place, "--out", str(scratch / f"scores{size}"), *settings])
    first, last = found[sizes[0]], found[sizes[-1]]
    claims = [
        Claim(f"peak memory of the driver, {sizes[-1]:,} images / {sizes[0]:,}", last[0] / first[0], 1.1, "lower", "x"),
        Claim(f"peak memory of an actor, {sizes[-1]:,} images / {sizes[0]:,}", last[1] / first[1], 1.1, "lower", "x"),
    ]
    table = "| images | driver MB | actor MB |\n|---|---|---|\n" + "\n".join(
        f"| {n:,} | {d:.0f} | {a:.0f} |" for n, (d, a) in found.items()
    )
    write("memory", "Memory by the size of the archive", claims, args.out, f"{ENCODER}, scenes of 32 px.\n\n{table}")


if __name__ == "__main__":
    main()
