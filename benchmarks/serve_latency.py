"""What the endpoint adds to the network's own time, and its throughput against `raysal label` on the same cores.

    pip install -e '.[bench]'
    python benchmarks/serve_latency.py

One client asks for one image at a time; the same images go through the same model in a bare loop that decodes, predicts and encodes. Then
16 clients of locust ask at once, and `raysal label` labels the same images. All by Ray's own proxy and by HAProxy. No image comes twice;
sides alternate.
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
from parts.endpoint import Up, endpoint, load, pictures
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

PROXIES = ("Ray's proxy", "HAProxy")
"""What stands before the replicas; the first is the default."""


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


def asked(up: Up, files: list[Path]) -> list[float]:
    """Seconds of each answer, over one connection."""
    seconds = []
    with httpx.Client(timeout=90, headers={"Authorization": f"Bearer {up.token}"} if up.token else {}) as client:
        for file in files:
            data = file.read_bytes()
            began = time.perf_counter()
            client.post(f"{up.url}/v1/masks", content=data).raise_for_status()
            seconds.append(time.perf_counter() - began)
    return seconds


def offline(checkpoint: str, files: list[Path], scratch: Path) -> float:
    """Images per second of `raysal label` by actors, without its start-up."""
    place, cfg = manifest(scratch / "manifest.parquet", [str(f) for f in files]), build({"compute": {"in_process": 0}})
    seen: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(dir=scratch) as labels, connected(cfg.compute):
        label_pool(place, checkpoint, labels, cfg, lambda done, *_: seen.append((time.perf_counter(), done)))
    (began, first), (ended, last) = seen[min(4, len(seen) - 2)], seen[-1]
    return (last - first) / (ended - began)


def online(up: Up, images: Path, seconds: float, first: int) -> tuple[float, int]:
    """Images per second that 16 clients get, and how many were asked for."""
    answers = load(up, images, 16, seconds, first)
    steady = [a for a in answers if a.asked > answers[0].asked + 3 and a.status == 200]
    assert len(steady) > 10, {a.status for a in answers}
    return len(steady) / (max(a.asked + a.seconds for a in steady) - min(a.asked for a in steady)), len(answers)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    seconds, pairs, px, each = (8.0, 1, 64, 20) if args.quick else (args.seconds, args.pairs, args.px, 60)
    torch.set_num_threads(1)
    alone, label = list[float](), list[float]()
    answer: dict[str, list[float]] = {name: [] for name in PROXIES}
    rate: dict[str, list[float]] = {name: [] for name in PROXIES}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        checkpoint = untrained(scratch / "checkpoint", px, args.encoder)
        files, at = pictures(scratch / "images", each, px), 0
        fastest = (os.cpu_count() or 1) / statistics.median(bare(checkpoint, files)[5:])  # images/s that no endpoint can exceed
        loads = len(PROXIES) * pairs + 1  # of 16 clients, and one for the last `raysal label`
        files += pictures(scratch / "images", 3 * each * pairs + int(1.5 * fastest * seconds * loads), px, first=each)
        for _ in range(pairs):
            alone.append(statistics.median(bare(checkpoint, files[at : at + each])[5:]))
            for proxy in PROXIES:
                at += each
                with endpoint(checkpoint, haproxy=proxy == "HAProxy") as up:
                    answer[proxy].append(statistics.median(asked(up, files[at : at + each])[5:]))
                    found, n = online(up, scratch / "images", seconds, at + each)
                rate[proxy].append(found)
                at += n
            if at + n > len(files):
                raise SystemExit(f"{len(files)} images are too few: some would come twice")
            label.append(offline(checkpoint, files[at - n : at + n], scratch))
    claims = []
    for proxy in PROXIES:
        added = statistics.median(a - b for a, b in zip(answer[proxy], alone, strict=True))
        target = 0.85 if proxy == PROXIES[0] else None
        claims += [
            Claim(f"{proxy}, one client: seconds of an answer - seconds of the bare work", added, None, "lower", "s"),
            Claim(f"{proxy}, one client: seconds of an answer / of the bare work", median_ratio(answer[proxy], alone), None, "lower", "x"),
            Claim(f"{proxy}, 16 clients: images/s / raysal label, steady", median_ratio(rate[proxy], label), target, "higher", "x"),
        ]
    head = f"DeepLabV3+ with {args.encoder}, {px} px, one replica, {os.cpu_count()} cores; locust runs on the same ones. "
    head += f"The default is {PROXIES[0]}; HAProxy listens on every address and needs tokens.\n\n"
    sides = {"bare, s": alone} | {f"answer by {p}, s": answer[p] for p in PROXIES}
    sides |= {f"16 clients by {p}, images/s": rate[p] for p in PROXIES} | {"raysal label, images/s": label}
    table = ["| side | each time |", "|---|---|", *(f"| {side} | {', '.join(f'{v:.3g}' for v in vs)} |" for side, vs in sides.items())]
    write("serve_latency", "The endpoint beside the bare model", claims, args.out, head + "\n".join(table))


if __name__ == "__main__":
    main()
