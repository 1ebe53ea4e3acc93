"""Scoring a pool through Ray Data against plain loops over as many processes on the same cores, and against the pipeline that one copies.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --images PATH/mars/images --encoder resnet18

All sides fetch, decode and score the same images with the same model and write Parquet tables: a plain loop in eager float32, a plain loop
with the runtime that `auto` picks here, `raysal.stream.score` with that runtime, and Ray's documented `read_images` and `map_batches` in
eager float32. Whole times run from the call to the finished table, start of processes and loading of the model included (Ray itself is
up); steady rates leave out each process's first two batches, or the first blocks of the stream. Runs alternate. What processors with
bfloat16 do is another result than what others do.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from common import Claim, median_ratio, options, write
from torch.utils.flop_counter import FlopCounterMode

from raysal.answers import embed
from raysal.archive.fetch import fetch_image
from raysal.archive.tables import manifest_schema, write_table
from raysal.cluster import connected, data_context
from raysal.config import Config, ModelConfig, build
from raysal.datasets.synthetic import write_archive
from raysal.images.decode import decode_image
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.engines import EAGER, Runtime, settle
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.query.scores import score_images
from raysal.stream.score import score_pool

WARM_BATCHES = 2


@dataclass(frozen=True)
class Timed:
    """Images per second, start-up included and left out (nan where that was not measured)."""

    whole: float
    steady: float = math.nan


def scored(predictor: Predictor, images: list[np.ndarray], cfg: Config) -> dict[str, Any]:
    """Columns of the scores of images of one size."""
    z1, z2, features = predictor.logits_and_features(images, cfg.score.resolution)
    scores = score_images(z1, z2, torch.ones(len(images), *images[0].shape[:2], dtype=torch.bool), cfg.score)
    return scores | {"embedding": embed(features, cfg.score.embedding_dim)}


def plain(checkpoint: str, uris: list[str], out: str, cfg: Config, runtime: Runtime, rates: Any) -> None:
    """One process of a plain loop: what a script without Ray would do."""
    torch.set_num_threads(1)
    predictor, rows, done = Predictor.load(checkpoint, runtime=runtime), [], []
    todo = iter(uris)
    while batch := list(islice(todo, cfg.score.batch_size)):
        images = [decode_image(fetch_image(uri, cfg.data.max_bytes), cfg.data.max_pixels, uri) for uri in batch]
        columns = scored(predictor, images, cfg)
        rows += [{"uri": uri, **{name: values[i].tolist() for name, values in columns.items()}} for i, uri in enumerate(batch)]
        done.append((time.perf_counter(), len(rows)))
    write_table(out, pa.Table.from_pylist(rows))
    (began, first), (ended, last) = done[min(WARM_BATCHES, len(done) - 2)], done[-1]
    rates.put((last - first) / (ended - began))


def run_plain(checkpoint: str, uris: list[str], folder: Path, cfg: Config, processes: int, runtime: Runtime) -> Timed:
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    rates = context.SimpleQueue()
    workers = [
        context.Process(target=plain, args=(checkpoint, uris[i::processes], str(folder / f"{i}.parquet"), cfg, runtime, rates))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    whole = len(uris) / (time.perf_counter() - start)
    return Timed(whole, sum(rates.get() for _ in workers))


def run_stream(checkpoint: str, manifest: pa.Table, out: Path, cfg: Config, processes: int) -> Timed:
    seen: list[tuple[float, int]] = []
    summary = score_pool(manifest, checkpoint, str(out), cfg, on_progress=lambda done, *_: seen.append((time.perf_counter(), done)))
    (began, first), (ended, last) = seen[min(2 * processes, len(seen) - 2)], seen[-1]
    return Timed(summary.images_per_second, (last - first) / (ended - began))


class Documented:
    """The callable class of Ray Data's guides to batch inference."""

    def __init__(self, checkpoint: str, cfg: Config) -> None:
        torch.set_num_threads(1)
        self.predictor, self.cfg = Predictor.load(checkpoint), cfg

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"uri": batch["path"]} | scored(self.predictor, list(batch["image"]), self.cfg)


def run_documented(checkpoint: str, uris: list[str], out: Path, cfg: Config, processes: int) -> Timed:
    start = time.perf_counter()
    with data_context():
        images = ray.data.read_images(uris, include_paths=True, mode="RGB")
        found = images.map_batches(
            Documented,
            fn_constructor_args=(checkpoint, cfg),
            batch_size=cfg.score.batch_size,
            compute=ray.data.ActorPoolStrategy(size=processes),
            num_cpus=cfg.compute.cpus_per_actor,
        )
        found.write_parquet(str(out))
    return Timed(len(uris) / (time.perf_counter() - start))


def ceiling(model: ModelConfig, px: int) -> str:
    """What the cores can do at most in float32: how fast one multiplies matrices, and what an image takes."""
    torch.set_num_threads(1)
    a, b, seconds = torch.randn(2048, 2048), torch.randn(2048, 2048), list[float]()
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    net = TwoBranch(model, S5MARS.n_classes, 0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        net(torch.zeros(1, 3, px, px))
    peak, image, cores = 2 * 2048**3 / min(seconds) / 1e9, counted.get_total_flops() / 1e9, os.cpu_count() or 1
    return (
        f"One core multiplies float32 matrices at {peak:.0f} GFLOP/s, an image takes {image:.1f} GFLOP: by plain arithmetic {cores} cores "
        f"do at most {cores * peak / image:.1f} images/s in float32."
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=Path, help="folder of images of one size; default: synthetic scenes")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--px", type=int, default=256, help="side of the synthetic scenes")
    parser.add_argument("--scale", type=float, default=1.0, help="data.input_scale")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    count, pairs, px = (24 * (os.cpu_count() or 1), 1, 64) if args.quick else (args.count, args.pairs, args.px)
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        if args.images is None:
            write_archive(str(scratch / "archive"), min(count, 200), 1, px, 0)
        files = sorted((args.images or scratch / "archive" / "images").iterdir())
        uris = [str(files[i % len(files)]) for i in range(count)]
        cfg = build({"compute": {"score_actors": processes}, "score": {"scores": ["entropy", "uncertainty"]}})
        model = ModelConfig(encoder=args.encoder)
        runtime = settle(cfg.runtime, model, "cpu")
        checkpoint = str(scratch / "checkpoint")
        save(checkpoint, TwoBranch(model, S5MARS.n_classes, 0), ModelInfo(S5MARS, model, args.scale, px))
        rows = [{"id": f"{i:032d}", "uri": uri} for i, uri in enumerate(uris)]
        manifest = pa.Table.from_pylist(rows, schema=manifest_schema())
        found: dict[str, list[Timed]] = {"plain, eager float32": [], "plain, runtime": [], "raysal": [], "read_images + map_batches": []}
        with connected(cfg.compute):
            for i in range(pairs):
                eager = run_plain(checkpoint, uris, scratch, cfg, processes, EAGER)
                same = run_plain(checkpoint, uris, scratch, cfg, processes, runtime)
                stream = run_stream(checkpoint, manifest, scratch / f"scores{i}", cfg, processes)
                documented = run_documented(checkpoint, uris, scratch / f"documented{i}", cfg, processes)
                for name, timed in zip(found, (eager, same, stream, documented), strict=True):
                    found[name].append(timed)

    def ratio(over: str, kind: str) -> float:
        return median_ratio([getattr(t, kind) for t in found["raysal"]], [getattr(t, kind) for t in found[over]])

    eager, same, _, documented = found
    ours = f"steady images/s with {runtime}"
    claims = [
        Claim(f"{ours} / plain loop over {processes} processes, eager float32", ratio(eager, "steady"), 2.5, "higher", "x"),
        Claim(f"{ours} / plain loop, the same runtime", ratio(same, "steady"), 0.95, "higher", "x"),
        Claim("images/s with start-up / plain loop, the same runtime", ratio(same, "whole"), 0.90, "higher", "x"),
        Claim("images/s with start-up / read_images + map_batches, eager float32", ratio(documented, "whole"), 2.0, "higher", "x"),
    ]
    size = "real images" if args.images else f"scenes of {px} px"
    side = max(1, round(args.scale * (decode_image(fetch_image(uris[0], 2**30), 2**30, uris[0]).shape[0] if args.images else px)))
    lines = [f"{count} {size}, DeepLabV3+ with {args.encoder}, input scale {args.scale:g}. {ceiling(model, side)}", ""]
    lines += ["| side | images/s, whole | steady |", "|---|---|---|"]
    lines += [f"| {n} | {', '.join(f'{t.whole:.1f}' for t in v)} | {', '.join(f'{t.steady:.1f}' for t in v)} |" for n, v in found.items()]
    name = "scoring" if runtime.precision == "float32" else f"scoring_{runtime.precision}"
    write(name, "Scoring a pool", claims, args.out, "\n".join(lines), {"IMAGES": args.images} if args.images else {})


if __name__ == "__main__":
    main()
