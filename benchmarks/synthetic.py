"""Are the synthetic scenes hard enough? 3% random labels against all labels, labelled loss only, the same steps.

python benchmarks/synthetic.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from common import Claim, options, write

from raysal.cluster import connected
from raysal.config import Config, load
from raysal.datasets.build import build
from raysal.rounds.choose import random_start
from raysal.rounds.loop import Watcher
from raysal.rounds.single import train_once


def trained(cfg: Config, labels: int, seed: int, scratch: Path) -> float:
    """Val mIoU after a training on some random labels."""
    cfg = cfg.model_copy(update={"seed": seed, "run": str(scratch / f"{labels}-{seed}")})
    dataset = build(cfg.data, cfg.run)
    pool = dataset.split("train")
    by_id = {item.id: item for item in pool}
    names = scratch / f"{labels}-{seed}.txt"
    names.write_text("\n".join(by_id[row["id"]].name for row in random_start(dataset, pool, labels, seed)))
    return float(train_once(cfg, [str(names)], Watcher())["miou"])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    steps, seeds = (4, 1) if args.quick else (args.steps, args.seeds)
    config = Path(__file__).parents[1] / "configs" / "demo.yaml"
    cfg = load(config, ["cps.weight=0", f"train.steps={steps}", "train.eval_every=0", "train.batch_labeled=8"])
    n = cfg.data.synthetic.images
    few = round(0.03 * n)
    with tempfile.TemporaryDirectory() as scratch, connected(cfg.compute):
        pairs = [(trained(cfg, few, s, Path(scratch)), trained(cfg, n, s, Path(scratch))) for s in range(seeds)]
    ratio = statistics.mean(a for a, _ in pairs) / statistics.mean(b for _, b in pairs)
    claims = [Claim(f"val mIoU with {few} random labels / with all {n}, labelled loss only, {steps} steps", ratio, 0.85, "lower", "x")]
    notes = f"Configuration demo.yaml, from random weights. mIoU by seed ({few} labels, {n} labels): " + json.dumps(
        [[round(a, 4), round(b, 4)] for a, b in pairs]
    )
    write("synthetic", "How hard the synthetic scenes are", claims, args.out, notes)


if __name__ == "__main__":
    main()
