"""Do the audit's intervals hold the truth as often as they say? Many random audits of a pool whose every mask is known.

    python benchmarks/audit.py --data PATH/mars --run runs/marsscapes

The last model of a run (benchmarks/marsscapes_loop.py leaves one) masks the whole pool but the images it learnt from; then audits of
several sizes are drawn again and again, as `raysal audit` draws one, and their 95% intervals are compared with the pool's mIoU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import Claim, options, write
from rich.progress import track

from raysal.archive.tables import read_table
from raysal.config import load
from raysal.datasets.build import build
from raysal.labels import IGNORE
from raysal.model.audit import class_iou, estimate
from raysal.model.metrics import confusion
from raysal.model.runtime import Predictor

SIZES = (10, 20, 30, 50)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", required=True, help="the labelled set that the run was made on, in raysal's folder layout")
    parser.add_argument("--weights", help="not used: the run has its model")
    parser.add_argument("--run", default="runs/marsscapes", help="folder of a finished run")
    parser.add_argument("--label-set", default="marsscapes")
    parser.add_argument("--audits", type=int, default=400, help="of each size")
    args = parser.parse_args()
    cfg = load(None, ["data.reader=folder", f"data.root={args.data}", f"data.label_set={args.label_set}"])
    rounds = sorted((Path(args.run) / "rounds").iterdir())
    learnt = {name for folder in rounds for name in read_table(str(folder / "labels.parquet"), ["name"])["name"].to_pylist()}
    dataset, predictor = build(cfg.data, cfg.run), Predictor.load(str(rounds[-1] / "checkpoint"))
    n = dataset.label_set.n_classes
    pool = [item for item in dataset.split("train") if item.name not in learnt][: 60 if args.quick else None]
    confusions, blanks = np.zeros((len(pool), n, n)), np.zeros((len(pool), n))
    for i, item in enumerate(track(pool, "masks", disable=None)):
        image = dataset.image(item)
        mask, truth = predictor.predict([image]).masks[0], dataset.mask(item, image.shape[:2])
        confusions[i] = confusion(torch.from_numpy(mask), torch.from_numpy(truth), n).numpy()
        blanks[i] = np.bincount(mask[truth == IGNORE], minlength=n)
    predicted_C, true_C = confusions.sum((0, 1)) + blanks.sum(0), class_iou(confusions.sum(0))
    rng, audits = np.random.default_rng(0), 10 if args.quick else args.audits
    rows, claims = [], []
    for size in SIZES:
        found = []
        for k in track(range(audits), f"{size} images"):
            drawn = rng.choice(len(pool), size, replace=False)
            miou, by_class = estimate(confusions[drawn], blanks[drawn], predicted_C, len(pool), k)
            known = [c for c, e in enumerate(by_class) if not np.isnan(e.value)]
            found.append((miou.value, miou.low, miou.high, true_C[known].mean(), len(known)))
        value, low, high, true, classes = np.array(found).T
        held, half = float(np.mean((low <= true) & (true <= high))), float((high - low).mean() / 2)
        rows.append(f"| {size} | {held:.3f} | {(value - true).mean():+.3f} | {half:.3f} | {classes.mean():.1f} |")
        claims.append(Claim(f"share of audits of {size} images whose 95% interval holds the pool's mIoU", held, 0.95, "higher", ""))
    notes = (
        f"{len(pool)} images of the pool, none learnt from, their mIoU {np.nanmean(true_C):.3f}; {audits} audits of each size. The truth "
        "of an audit is the pool's mIoU over the classes that it knows.\n\n"
        "| images | holds the truth | mean error | half of the interval | classes known |\n|---|---|---|---|---|\n" + "\n".join(rows)
    )
    places = {"DATA": args.data, "RUN": args.run} | ({"WEIGHTS": args.weights} if args.weights else {})
    write("audit", "Audits of masks: intervals against the truth", claims, args.out, notes, places)


if __name__ == "__main__":
    main()
