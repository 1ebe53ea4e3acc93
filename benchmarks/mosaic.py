"""Large images in tiles: memory by the image's size, and how much the tiled mask differs from the untiled one.

    python benchmarks/mosaic.py
    python benchmarks/mosaic.py --checkpoint RUN/rounds/001/checkpoint --images PATH/mars/panoramas

`raysal label` and `raysal score` run in processes of their own over one JPEG mosaic of growing size, and resident memory is sampled. With
--checkpoint and --images, each image is predicted whole and in tiles by that model, and the two masks are compared, near the lines where
tiles meet too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from common import Claim, options, write
from parts.scenes import ENCODER, untrained
from PIL import Image

from raysal.datasets.synthetic import scene
from raysal.images.decode import decode_image
from raysal.images.tiles import Grid
from raysal.model.runtime import Predictor

LIMIT = 10**9


def mosaic(file: Path, side: int) -> str:
    """A JPEG of so many pixels a side, of synthetic scenes; its place."""
    row = [np.concatenate([scene(0, 4 * i + j, 500)[0] for j in range(4)], axis=1) for i in range(4)]
    block, n = np.concatenate(row), -(-side // 2000)
    Image.fromarray(np.tile(block, (n, n, 1))[:side, :side]).save(file, quality=90)
    return str(file)


def measured(verb: str, checkpoint: str, folder: Path, out: Path) -> tuple[float, float]:
    """Seconds of `raysal label` or `score` on a folder, and its largest resident GB."""
    settings = [f"data.max_pixels={LIMIT}", f"data.max_bytes={LIMIT}"]
    arguments = [verb, checkpoint, str(folder), "--out", str(out), *(a for s in settings for a in ("--set", s))]
    started, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "raysal", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            most = max(most, watched.memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.02)
    said, errors = process.communicate()
    assert process.returncode == 0 and "1 ok" in said + errors, (said + errors)[-2000:]
    return time.perf_counter() - started, most / 1e9


def seams(predictor: Predictor, image_HWC: np.ndarray) -> tuple[float, float | None]:
    """Shares of pixels whose class differs between the whole image's mask and the tiles': of all, and of those where tiles fade."""
    model = predictor.info.model
    whole = predictor.predict([image_HWC]).masks[0]
    predictor.info = replace(predictor.info, model=model.model_copy(update={"whole_pixels": 1}))
    tiled = predictor.masks([image_HWC])[0]
    predictor.info = replace(predictor.info, model=model)
    grid = Grid.over(whole.shape, model.tile_px, model.overlap_px)
    near = np.zeros(whole.shape, bool)
    for axis, found in enumerate((grid.rows, grid.cols)):
        for a, b in pairwise(found):
            near[(slice(None),) * axis + (slice(b.low, a.high),)] = True
    differ = whole != tiled
    return float(differ.mean()), float(differ[near].mean()) if near.any() else None


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--checkpoint", help="a trained model")
    parser.add_argument("--images", type=Path, help="folder of large images")
    parser.add_argument("--scale", type=float, default=0.25, help="of images before the network; memory is the same at any, time is not")
    parser.add_argument("--sides", type=int, nargs="+", default=[5_000, 10_000, 20_000])
    args = parser.parse_args()
    sides, claims, lines = [2_100, 2_500] if args.quick else args.sides, [], []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        checkpoint = untrained(scratch / "checkpoint", 256, scale=args.scale)
        found, scored = {}, {}
        for side in sides:
            folder = scratch / str(side)
            folder.mkdir()
            mosaic(folder / "mosaic.jpg", side)
            found[side] = measured("label", checkpoint, folder, scratch / f"labels{side}")
            scored[side] = measured("score", checkpoint, folder, scratch / f"scores{side}")
            (folder / "mosaic.jpg").unlink()
    (first, (_, least)), (last, (_, most)) = next(iter(found.items())), list(found.items())[-1]
    claims.append(Claim(f"resident memory of labelling one image of {last:,} x {last:,} px", most, None, "lower", "GB"))
    grown = (most - least) * 1e9 / (last**2 - first**2)
    claims.append(Claim(f"bytes of memory for each pixel more, {first:,} to {last:,} px a side", grown, None, "lower", "B"))
    lines += [
        f"{ENCODER}, input scale {args.scale:g}.",
        "",
        "| side, px | label: s | Mpx/s | GB | score: s | GB |",
        "|---|---|---|---|---|---|",
    ]
    for side, (seconds, gb) in found.items():
        lines.append(
            f"| {side:,} | {seconds:.0f} | {side**2 / seconds / 1e6:.2f} | {gb:.2f} | {scored[side][0]:.0f} | {scored[side][1]:.2f} |"
        )
    if args.checkpoint and args.images:
        predictor = Predictor.load(args.checkpoint)
        lines += ["", "| image | size | differs | where tiles fade |", "|---|---|---|---|"]
        shares = []
        for file in sorted(args.images.iterdir())[: 1 if args.quick else None]:
            if file.suffix.lower() not in (".jpg", ".jpeg", ".png"):
                continue
            image = decode_image(file.read_bytes(), LIMIT, file.name)
            shares.append(seams(predictor, image))
            fade = "-" if shares[-1][1] is None else f"{shares[-1][1]:.4f}"
            lines.append(f"| {file.name} | {image.shape[1]} x {image.shape[0]} | {shares[-1][0]:.4f} | {fade} |")
        for k, what in enumerate(("of all pixels", "of pixels where tiles fade")):
            values = [share[k] for share in shares if share[k] is not None]
            said = f"share {what} whose class the tiles change, mean of {len(values)} images"
            claims.append(Claim(said, float(np.mean(values)), None, "lower", ""))
    places = {"CHECKPOINT": args.checkpoint, "IMAGES": args.images} if args.checkpoint and args.images else {}
    write("mosaic", "Large images in tiles", claims, args.out, "\n".join(lines), places)


if __name__ == "__main__":
    main()
