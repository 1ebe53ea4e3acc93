"""A training step under Ray Train against the same loop under plain torch: one worker, and two workers against torchrun.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --config configs/marsscapes.yaml --set data.root=PATH --set model.encoder_weights=PATH

Both sides run raysal/train/loop.py on the same draws. The plain side feeds unlabelled images from a torch DataLoader with one worker
process; Ray's side feeds them from a Ray Data shard. Runs alternate, and ratios are of neighbours.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import Claim, median_ratio, options, write
from parts.plain import PlainSession

from raysal.archive.uris import join
from raysal.config import Config, load
from raysal.datasets.build import build
from raysal.rounds.single import count_classes
from raysal.train.logs import read_log
from raysal.train.loop import train
from raysal.train.plan import Plan


def plan_of(cfg: Config, labeled: int) -> Plan:
    dataset = build(cfg.data, cfg.run)
    pool = dataset.split(cfg.data.pool_split)
    counts = count_classes(dataset, pool[:labeled])
    images = tuple((counts > 0).sum(0).tolist())
    return Plan(cfg, dataset, pool[:labeled], pool[labeled:], (), tuple(counts.sum(0).tolist()), images)


def step_seconds(folder: str, warm: int) -> float:
    """Median seconds of a step after the first `warm` steps."""
    return statistics.median(r["step_s"] for r in read_log(folder) if r.get("step", 0) > warm and "step_s" in r)


def plain(config: str, folder: str) -> None:
    """What torchrun runs."""
    cfg = Config.model_validate_json(Path(config).read_text())
    torch.set_num_threads(cfg.compute.threads)
    train(plan_of(cfg, cfg.loop.initial), PlainSession(plan_of(cfg, cfg.loop.initial), folder))


def measure(cfg: Config, scratch: Path, name: str, workers: int, threads: int, warm: int) -> tuple[float, float]:
    """Seconds of a step (plain torch, Ray Train)."""
    from raysal.cluster import connected
    from raysal.train.ray import fit

    cfg = cfg.model_copy(update={"compute": cfg.compute.model_copy(update={"train_workers": workers, "threads": threads})})
    (scratch / f"{name}.json").write_text(cfg.model_dump_json())
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={workers}", "--master-port=29511"] if workers > 1 else []
    command = [sys.executable, *launch, __file__, "--plain", str(scratch / f"{name}.json"), join(str(scratch), name, "plain")]
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    with connected(cfg.compute):
        fit(plan_of(cfg, cfg.loop.initial), join(str(scratch), name, "ray"))
    return step_seconds(join(str(scratch), name, "plain"), warm), step_seconds(join(str(scratch), name, "ray"), warm)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    args = parser.parse_args()
    steps, pairs, warm = (6, 1, 2) if args.quick else (args.steps, args.pairs, 8)
    with tempfile.TemporaryDirectory() as scratch:
        fixed = [f"train.steps={steps}", "train.log_every=1", "train.eval_every=0", f"train.checkpoint_every={steps}", f"run={scratch}/run"]
        cfg = load(args.config, [*args.overrides, *fixed])
        claims, details, cores = [], [], os.cpu_count() or 1
        cases: list[tuple[int, int, str, float | None]] = [
            (1, cores, "plain torch, 1 worker", 0.95),
            (2, max(1, cores // 2), "torchrun, 2 workers", 0.95),
            (1, max(1, cores - 1), "plain torch, 1 worker that leaves a core to all else", None),
        ]
        for workers, threads, against, target in cases:
            pairs_s = [measure(cfg, Path(scratch), f"w{workers}-t{threads}-{i}", workers, threads, warm) for i in range(pairs)]
            ratio = median_ratio([p for p, _ in pairs_s], [r for _, r in pairs_s])
            claims.append(Claim(f"steps per second under Ray Train / {against}", ratio, target, "higher", "x"))
            said = f"{workers} worker(s) of {threads} thread(s), seconds a step (plain, Ray): "
            details.append(said + ", ".join(f"({p:.3f}, {r:.3f})" for p, r in pairs_s))
    write(
        "train_step",
        "A training step under Ray Train",
        claims,
        args.out,
        f"Configuration {Path(args.config).name}. " + ". ".join(details) + ".",
    )


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--plain":
        plain(sys.argv[2], sys.argv[3])
    else:
        main()
