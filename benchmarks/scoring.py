"""Scoring a pool through Ray Data against a plain loop over as many processes on the same cores.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --images PATH/mars/images --encoder tu-tf_efficientnet_lite0

Both sides fetch, decode and score the same images with the same model and write a Parquet table. Times run from the call to the finished
table, start of processes and loading of the model included (Ray itself is up, as it is in the loop). Runs alternate.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch
from common import Claim, median_ratio, options, write

from raysal.archive.tables import manifest_schema, write_table
from raysal.archive.uris import fetch_image
from raysal.cluster import connected
from raysal.config import Config, ModelConfig, build
from raysal.datasets.synthetic import write_archive
from raysal.images.decode import decode_image
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.query.scores import score_images
from raysal.stream.score import embed, score_pool


def plain(checkpoint: str, uris: list[str], out: str, cfg: Config) -> None:
    """One process of the plain loop: what a script without Ray would do."""
    torch.set_num_threads(1)
    predictor, rows = Predictor.load(checkpoint), []
    todo = iter(uris)
    while batch := list(islice(todo, cfg.score.batch_size)):
        images = [decode_image(fetch_image(uri, cfg.data.max_bytes), cfg.data.max_pixels, uri) for uri in batch]
        z1, z2, features = predictor.logits_and_features(images, cfg.score.resolution)
        valid = torch.ones(len(images), *images[0].shape[:2], dtype=torch.bool)
        scores = score_images(z1, z2, valid, cfg.score)
        fractions, embeddings = scores.pop("class_fractions"), embed(features, cfg.score.embedding_dim)
        for i, uri in enumerate(batch):
            numbers = {name: float(values[i]) for name, values in scores.items()}
            rows.append({"uri": uri, **numbers, "class_fractions": fractions[i].tolist(), "embedding": embeddings[i].tolist()})
    write_table(out, pa.Table.from_pylist(rows))


def run_plain(checkpoint: str, uris: list[str], folder: Path, cfg: Config, processes: int) -> float:
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    parts = [uris[i::processes] for i in range(processes)]
    workers = [context.Process(target=plain, args=(checkpoint, part, str(folder / f"{i}.parquet"), cfg)) for i, part in enumerate(parts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return time.perf_counter() - start


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=Path, help="folder of images of one size; default: synthetic scenes")
    parser.add_argument("--encoder", default="tu-mobilenetv3_small_100")
    parser.add_argument("--scale", type=float, default=1.0, help="data.input_scale")
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    count, pairs = (24, 1) if args.quick else (args.count, args.pairs)
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        if args.images is None:
            write_archive(str(scratch / "archive"), count, 1, 128, 0)
        files = sorted((args.images or scratch / "archive" / "images").iterdir())
        uris = [str(files[i % len(files)]) for i in range(count)]
        cfg = build({"model": {"encoder": args.encoder}, "compute": {"score_actors": processes}})
        model = ModelConfig(encoder=args.encoder)
        checkpoint = str(scratch / "checkpoint")
        save(checkpoint, TwoBranch(model, S5MARS.n_classes, 0), ModelInfo(S5MARS, model, args.scale, 128))
        rows = [{"id": f"{i:032d}", "uri": uri} for i, uri in enumerate(uris)]
        manifest = pa.Table.from_pylist(rows, schema=manifest_schema())
        seconds: list[tuple[float, float]] = []
        with connected(cfg.compute):
            for i in range(pairs):
                alone = run_plain(checkpoint, uris, scratch, cfg, processes)
                streamed = score_pool(manifest, checkpoint, str(scratch / f"scores{i}"), cfg).seconds
                seconds.append((alone, streamed))
    ratio = median_ratio([a for a, _ in seconds], [s for _, s in seconds])
    what = f"{count} images, {args.encoder}, input scale {args.scale:g}"
    claims = [Claim(f"scoring by Ray Data / a plain loop over {processes} processes, images per second", ratio, 0.90, "higher", "x")]
    notes = f"{what}. Images per second (plain, Ray Data): " + ", ".join(f"({count / a:.1f}, {count / s:.1f})" for a, s in seconds) + "."
    write("scoring", "Scoring a pool", claims, args.out, notes)


if __name__ == "__main__":
    main()
