"""A whole archive on S3: index, score, label, kill, resume, everything read from and written to s3://.

    python benchmarks/s3.py

The server is moto's, in a process of its own on this machine; the cluster has two nodes. Labelling is killed at random moments (driver,
actor, node). The output is compared with an undisturbed one of the same files on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from common import Claim, options, write
from parts.killer import Killer, killed, masks
from parts.scenes import ENCODER, scenes, untrained

from raysal.archive.tables import read_table
from raysal.errors import RaysalError

BUCKET = "s3://archive"


@contextmanager
def server() -> Iterator[None]:
    """An S3 server; this process and all that it starts find it."""
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True)
    try:
        address = next(line.split()[-1] for line in process.stderr if "Running on http" in line)
        os.environ |= {"FSSPEC_S3_ENDPOINT_URL": address, "FSSPEC_S3_KEY": "k", "FSSPEC_S3_SECRET": "s", "NO_PROXY": "127.0.0.1"}
        fsspec.config.conf["s3"] = {"endpoint_url": address, "key": "k", "secret": "s"}
        fsspec.filesystem("s3").mkdir(BUCKET)
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield
        drain.kill()
    finally:
        process.kill()
        process.wait()


def raysal(*arguments: str) -> dict:
    """What a command says as JSON."""
    done = subprocess.run([sys.executable, "-m", "raysal", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise RaysalError(f"raysal {arguments[0]} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def names(labels: str) -> dict[str, str]:
    """File names by id."""
    return {row["id"]: Path(row["uri"]).name for row in read_table(labels, ["id", "uri"]).to_pylist()}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, kills = (60, 3) if args.quick else (args.images, args.kills)
    settings = ["--set", "compute.score_actors=2", "--set", "score.batch_size=4"]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, server():
        scratch, store = Path(name), fsspec.filesystem("s3")
        files = scenes(scratch / "archive", images, 128)
        checkpoint = untrained(scratch / "checkpoint", 128)
        store.put(checkpoint, f"{BUCKET}/model", recursive=True)
        for file in files:
            store.put(file, f"{BUCKET}/raw/{Path(file).name}")
        model, place = f"{BUCKET}/model", f"{BUCKET}/manifest"
        steps = {
            "index": ["index", f"{BUCKET}/raw", "--out", place],
            "score": ["score", model, place, "--out", f"{BUCKET}/scores", *settings],
        }
        for step, arguments in steps.items():
            start = time.perf_counter()
            said = raysal(*arguments)
            seconds[step] = time.perf_counter() - start
        scored = said["counts"]["ok"]
        start = time.perf_counter()
        out = f"{BUCKET}/labels"
        killer = Killer(["label", model, place, "--out", out, *settings], args.seed)
        done = killed(killer, kills)
        seconds["label, killed"] = time.perf_counter() - start
        again = raysal("label", model, place, "--out", out, *settings)
        found = masks(out)
        raysal("label", checkpoint, str(Path(files[0]).parent), "--out", str(scratch / "alone"), *settings)
        alone = masks(str(scratch / "alone"))
        here, there = names(str(scratch / "alone")), names(out)
    expected = {here[i]: row for i, row in alone.items()}
    same = sum(expected[there[i]] == row for i, row in found.items())
    share = f"share of {images} images on S3 with the undisturbed mask, once each, after {len(done)} kills"
    claims = [
        Claim(share, same / images, 1.0, "higher", ""),
        Claim("rows of no image, or of an image a second time", len(found) - images, 0, "lower", ""),
        Claim("kills by SIGKILL while work went on", len(done), float(kills), "higher", ""),
        Claim("share of the images that were scored on S3", scored / images, 1.0, "higher", ""),
        Claim("images that a further run does", again["done"], 0, "lower", ""),
    ]
    counted = ", ".join(f"{n} x {kind}" for kind, n in sorted(Counter(done).items()))
    took = ", ".join(f"{step} {s:.0f} s" for step, s in seconds.items())
    notes = f"Killed: {counted}. {images} scenes of 128 px, {ENCODER}, two actors, two nodes; {took}, start-up included."
    write("s3", "An archive on S3", claims, args.out, notes)


if __name__ == "__main__":
    main()
