"""One sol of one rover, 200 images: from the command to committed labels, and what of it is not the model's work.

    python benchmarks/one_sol.py --images PATH/mars/unlabeled --checkpoint RUN/rounds/002/checkpoint

`raysal label` runs as a user runs it, in a new process each time. The bare side loads nothing and decodes nothing: the same images, in
memory, through the same model on the same cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Claim, options, write
from parts.scenes import manifest, scenes, untrained

from raysal.archive.fetch import fetch_image
from raysal.config import build
from raysal.images.decode import decode_image
from raysal.model.checkpoint import read_info
from raysal.model.engines import settle
from raysal.model.runtime import Predictor


def command(checkpoint: str, place: str, out: Path, settings: list[str]) -> tuple[float, float]:
    """Seconds of the command, and of these until its first shard was written."""
    arguments = ["label", checkpoint, place, "--out", str(out), *settings, "--json"]
    started, first = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, "-m", "raysal", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        if not first and next(out.glob("part-*.parquet"), None):
            first = time.perf_counter() - started
        time.sleep(0.01)
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    assert json.loads(said)["counts"]["ok"] > 0
    return time.perf_counter() - started, first


def bare(checkpoint: str, uris: list[str], batch: int) -> float:
    """Seconds of the forward passes alone, by the runtime that the command takes."""
    cfg = build({}).data
    predictor = Predictor.load(checkpoint, runtime=settle(build({}).runtime, read_info(checkpoint).model, "cpu"))
    images = [decode_image(fetch_image(uri, cfg.max_bytes), cfg.max_pixels, uri) for uri in uris]
    predictor.predict(images[:batch])
    started = time.perf_counter()
    for i in range(0, len(images), batch):
        predictor.predict(images[i : i + batch])
    return time.perf_counter() - started


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=Path, help="folder of images of one size; default: synthetic scenes")
    parser.add_argument("--checkpoint", help="default: an untrained model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    count, repeats = (12, 1) if args.quick else (args.count, args.repeats)
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        uris = [str(f) for f in sorted(args.images.iterdir())[:count]] if args.images else scenes(scratch / "archive", count, 256)
        place = manifest(scratch / "manifest.parquet", uris)
        checkpoint = args.checkpoint or untrained(scratch / "checkpoint", 256)
        here, on_ray, model = [], [], []
        for i in range(repeats):
            model.append(bare(checkpoint, uris, 8))
            here.append(command(checkpoint, place, scratch / f"here{i}", []))
            on_ray.append(command(checkpoint, place, scratch / f"ray{i}", ["--set", "compute.in_process=0"]))
    work = statistics.median(model)
    whole, first = (statistics.median(v) for v in zip(*here, strict=True))
    ray_whole, ray_first = (statistics.median(v) for v in zip(*on_ray, strict=True))
    claims = [
        Claim(f"seconds from the command to {count} committed labels", whole, None, "lower", "s"),
        Claim("share of that time that is not the model's work", 1 - work / whole, None, "lower", ""),
        Claim("seconds from the command to the first committed labels", first, 15.0, "lower", "s"),
        Claim("the same with Ray started for it (compute.in_process=0): seconds to all labels", ray_whole, None, "lower", "s"),
        Claim("the same with Ray started for it: seconds to the first committed labels", ray_first, 15.0, "lower", "s"),
    ]
    notes = f"Forward passes alone: {work:.1f} s for {count} images. Medians of {repeats}."
    places = {"IMAGES": args.images or scratch, "CHECKPOINT": args.checkpoint or scratch}
    write("one_sol", "One sol, from the command to the labels", claims, args.out, notes, places)


if __name__ == "__main__":
    main()
