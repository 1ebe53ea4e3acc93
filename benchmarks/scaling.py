"""Two workers on two cores against one worker on one core, each with the same work: a training step, and scoring.

    python benchmarks/scaling.py

Weak scaling: with two workers the batch, and the number of images to score, is twice as large. All processes of a side, Ray's own included,
are held to its cores (taskset). Sides alternate, and ratios are of neighbours.
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

from common import Claim, median_ratio, options, write
from parts.scenes import ENCODER, manifest, scenes, untrained

from raysal.config import build
from raysal.train.logs import read_log

WARM = 8
"""Steps that are not counted, while processes start."""


def step_seconds(folder: Path, workers: int, steps: int, px: int) -> float:
    """Median seconds of a step, of 4 labelled and 4 unlabelled images a worker."""
    from train_step import plan_of

    from raysal.cluster import connected
    from raysal.train.ray import fit

    tree = {
        "run": str(folder),
        "data": {"synthetic": {"images": 64, "val_images": 2, "size_px": px}},
        "augment": {"crop_px": px},
        "model": {"encoder": ENCODER},
        "train": {"steps": steps, "batch_labeled": 4 * workers, "batch_unlabeled": 4 * workers, "log_every": 1, "eval_every": 0},
        "compute": {"train_workers": workers, "threads": 1, "local_cpus": 4},
    }
    cfg = build(tree)
    with connected(cfg.compute):
        fit(plan_of(cfg, 16), str(folder / "train"))
    return statistics.median(r["step_s"] for r in read_log(str(folder / "train")) if r.get("step", 0) > WARM and "step_s" in r)


def images_per_second(folder: Path, workers: int, place: str, checkpoint: str) -> float:
    """Of scoring by so many actors, without its start."""
    from raysal.cluster import connected
    from raysal.stream.score import score_pool

    cfg = build({"compute": {"score_actors": workers, "in_process": 0, "local_cpus": 4}, "runtime": {"kind": "eager"}})
    seen: list[tuple[float, int]] = []
    with connected(cfg.compute):
        score_pool(place, checkpoint, str(folder), cfg, on_progress=lambda done, *_: seen.append((time.perf_counter(), done)))
    (began, first), (ended, last) = seen[min(2 * workers, len(seen) - 2)], seen[-1]
    return (last - first) / (ended - began)


def side(kind: str, workers: int, *arguments: object) -> float:
    """A side in a process of its own, on as many cores as it has workers."""
    command = ["taskset", "-c", f"0-{workers - 1}", sys.executable, __file__, "--side", kind, str(workers), *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=600, help="to score, a worker")
    parser.add_argument("--px", type=int, default=256)
    args = parser.parse_args()
    pairs, steps, images, px = (1, 12, 60, 64) if args.quick else (args.pairs, args.steps, args.images, args.px)
    times: dict[str, list[list[float]]] = {"train": [], "score": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        files, checkpoint = scenes(scratch / "archive", min(images, 200), px), untrained(scratch / "checkpoint", px)
        places = [manifest(scratch / f"manifest-{w}.parquet", (files * (2 * images))[: w * images]) for w in (1, 2)]
        for pair in range(pairs):
            times["train"].append([side("train", w, scratch / f"train-{pair}-{w}", steps, px) for w in (1, 2)])
            times["score"].append([side("score", w, scratch / f"score-{pair}-{w}", places[w - 1], checkpoint) for w in (1, 2)])
            print(times, flush=True)
    (one_s, two_s), (one, two) = zip(*times["train"], strict=True), zip(*times["score"], strict=True)
    claims = [
        Claim("training, images a second by 2 workers / twice those of 1", median_ratio(list(one_s), list(two_s)), 0.90, "higher", "x"),
        Claim("scoring, images a second by 2 actors / twice those of 1", median_ratio(list(two), list(one)) / 2, 0.95, "higher", "x"),
    ]
    each = {kind: ", ".join("({:.3g}, {:.3g})".format(*pair) for pair in pairs) for kind, pairs in times.items()}
    notes = (
        f"{ENCODER}, {px} px, one thread a worker. Seconds a step (1, 2 workers): {each['train']}; images/s (1, 2 actors): {each['score']}."
    )
    write("scaling", "Two workers on two cores against one on one", claims, args.out, notes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        kind, workers, folder, *rest = sys.argv[2:]
        if kind == "train":
            print(json.dumps(step_seconds(Path(folder), int(workers), int(rest[0]), int(rest[1]))))
        else:
            print(json.dumps(images_per_second(Path(folder), int(workers), rest[0], rest[1])))
    else:
        main()
