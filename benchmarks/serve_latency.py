"""What the endpoint adds to the network's own time, and its throughput against `raysal label` on the same cores.

    pip install -e '.[bench]'
    python benchmarks/serve_latency.py

One client asks for one image at a time; the same images go through the same model in a bare loop that decodes, predicts and encodes. Then
16 clients of locust ask at once, and `raysal label` labels the same images. No image comes twice. Sides alternate.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import torch
from common import Claim, median_ratio, options, write
from parts.endpoint import endpoint, load, pictures
from parts.scenes import manifest, untrained

from raysal.answers import Masks
from raysal.archive.fetch import fetch_image
from raysal.cluster import connected
from raysal.config import build
from raysal.images.decode import decode
from raysal.images.masks import encode_mask
from raysal.model.checkpoint import read_info
from raysal.model.engines import settle
from raysal.model.runtime import Predictor
from raysal.stream.label import label_pool
from raysal.stream.worker import Picture, Source


def bare(checkpoint: str, files: list[Path]) -> list[float]:
    """Seconds of each image: decode, predict, encode, in this process."""
    cfg = build({})
    predictor = Predictor.load(checkpoint, runtime=settle(cfg.runtime, read_info(checkpoint).model, "cpu"))
    masks, seconds = Masks(predictor, None, checkpoint), []
    for file in files:
        data = fetch_image(str(file), cfg.data.max_bytes)
        began = time.perf_counter()
        found = decode(data, cfg.data.max_pixels, file.name)
        encode_mask(masks.of([Picture(Source("", file.name), found.image_HWC, found.valid_HW, "")])[0].mask_HW)
        seconds.append(time.perf_counter() - began)
    return seconds


def asked(url: str, files: list[Path]) -> list[float]:
    """Seconds of each answer, over one connection."""
    seconds = []
    with httpx.Client(timeout=90) as client:
        for file in files:
            data = file.read_bytes()
            began = time.perf_counter()
            client.post(f"{url}/v1/masks", content=data).raise_for_status()
            seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    seconds, pairs, px, each = (8.0, 1, 64, 20) if args.quick else (args.seconds, args.pairs, args.px, 60)
    torch.set_num_threads(1)
    added, ratios, offline, online, alone, whole = [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        checkpoint = untrained(scratch / "checkpoint", px, args.encoder)
        files = pictures(scratch / "images", each * pairs * 2 + int(200 * seconds * pairs), px)
        at = 0
        for pair in range(pairs):
            with endpoint(checkpoint) as up:
                asked(up.url, files[at : at + 5])
                one, two = files[at + 5 : at + each], files[at + each : at + 2 * each]
                at += 2 * each
                alone.append(statistics.median(bare(checkpoint, two)[5:]))
                whole.append(statistics.median(asked(up.url, one)[5:]))
                added.append(whole[-1] - alone[-1])
                answers = load(up, scratch / "images", 16, seconds, at)
            steady = [a for a in answers if a.asked > answers[0].asked + 3 and a.status == 200]
            assert len(steady) > 10, {a.status for a in answers}
            online.append(len(steady) / (max(a.asked + a.seconds for a in steady) - min(a.asked for a in steady)))
            todo = files[at : at + len(answers)]
            at += len(answers)
            place, cfg = manifest(scratch / f"{pair}.parquet", [str(f) for f in todo]), build({"compute": {"in_process": 0}})
            seen: list[tuple[float, int]] = []

            def note(done: int, *_: object, to: list[tuple[float, int]] = seen) -> None:
                to.append((time.perf_counter(), done))

            with connected(cfg.compute):
                label_pool(place, checkpoint, str(scratch / f"labels{pair}"), cfg, note)
            (began, first), (ended, last) = seen[min(4, len(seen) - 2)], seen[-1]
            offline.append((last - first) / (ended - began))
            ratios.append(online[-1] / offline[-1])
    claims = [
        Claim("one client: seconds of an answer - seconds of the bare work", statistics.median(added), None, "lower", "s"),
        Claim("one client: seconds of an answer / of the bare work", median_ratio(whole, alone), None, "lower", "x"),
        Claim("16 clients: images/s / raysal label on the same cores, steady", statistics.median(ratios), 0.85, "higher", "x"),
    ]
    rows = [f"| {a:.3f} | {w:.3f} | {on:.1f} | {off:.1f} |" for a, w, on, off in zip(alone, whole, online, offline, strict=True)]
    head = f"DeepLabV3+ with {args.encoder}, {px} px, one replica, {os.cpu_count()} cores; locust runs on the same ones.\n\n"
    table = "| bare, s | answer, s | 16 clients, images/s | raysal label, images/s |\n|---|---|---|---|\n" + "\n".join(rows)
    write("serve_latency", "The endpoint beside the bare model", claims, args.out, head + table)


if __name__ == "__main__":
    main()
