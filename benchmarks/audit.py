"""Do the audit's intervals hold the truth as often as they say? Many random audits of images whose every mask is known.

    python benchmarks/audit.py --data PATH/mars --run runs/marsscapes

The last model of a run (benchmarks/marsscapes_loop.py leaves one) masks the pool but the images it learnt from, and val; then audits of
several sizes are drawn again and again, as `raysal audit` draws one, and their 95% intervals are compared with the true mIoU. How
intervals are made was settled on the pool; val shows whether that holds elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from common import Claim, options, write
from rich.progress import track

from raysal.archive.tables import read_table
from raysal.config import load
from raysal.datasets.base import Dataset, Item
from raysal.datasets.build import build
from raysal.errors import InputError, RaysalError
from raysal.labels import IGNORE
from raysal.model.audit import class_iou, estimate
from raysal.model.metrics import confusion
from raysal.model.runtime import Predictor

SIZES = (10, 20, 30, 50)


def counted(dataset: Dataset, items: list[Item], predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
    """Confusion [n, C, C] of each image, rows truth, and pixels without a truth by prediction [n, C]."""
    n = dataset.label_set.n_classes
    confusions, blanks = np.zeros((len(items), n, n)), np.zeros((len(items), n))
    for i, item in enumerate(track(items, "masks")):
        image = dataset.image(item)
        mask, truth = predictor.predict([image]).masks[0], dataset.mask(item, image.shape[:2])
        confusions[i] = confusion(torch.from_numpy(mask), torch.from_numpy(truth), n).numpy()
        blanks[i] = np.bincount(mask[truth == IGNORE], minlength=n)
    return confusions, blanks


def audited(split: str, confusions: np.ndarray, blanks: np.ndarray, audits: int) -> tuple[list[Claim], list[str]]:
    """Claims and rows of the table: many audits of each size."""
    predicted_C, true_C = confusions.sum((0, 1)) + blanks.sum(0), class_iou(confusions.sum(0))
    rng = np.random.default_rng(0)
    rows, claims = [], []
    for size in SIZES:
        found, class_held = [], []
        for k in track(range(audits), f"{size} images"):
            drawn = rng.choice(len(confusions), size, replace=False)
            miou, by_class = estimate(confusions[drawn], blanks[drawn], predicted_C, len(confusions), k)
            known = [c for c, e in enumerate(by_class) if not np.isnan(e.value)]
            class_held += [by_class[c].low <= true_C[c] <= by_class[c].high for c in known]
            found.append((miou.value, miou.low, miou.high, true_C[known].mean(), len(known)))
        value, low, high, true, classes = np.array(found).T
        held, half = float(np.mean((low <= true) & (true <= high))), float((high - low).mean() / 2)
        off, by_class_held = (value - true).mean(), np.mean(class_held)
        rows.append(f"| {split} | {size} | {held:.3f} | {by_class_held:.3f} | {off:+.3f} | {half:.3f} | {classes.mean():.1f} |")
        claims.append(Claim(f"{split}: share of audits of {size} images whose 95% interval holds the true mIoU", held, 0.95, "higher", ""))
    return claims, rows


def run() -> None:
    """Draws the audits and writes what they show."""
    parser = options(__doc__)
    parser.add_argument("--data", required=True, help="the labelled set that the run was made on, in raysal's folder layout")
    parser.add_argument("--weights", help="not used: the run has its model")
    parser.add_argument("--run", default="runs/marsscapes", help="folder of a finished run")
    parser.add_argument("--label-set", default="marsscapes", help="classes of the masks: a name or a classes.json")
    parser.add_argument("--audits", type=int, default=400, help="of each size")
    args = parser.parse_args()
    for place in (args.data, args.run):
        if not Path(place).is_dir():
            hint = "" if place == args.data else "; benchmarks/marsscapes_loop.py makes one"
            raise InputError(f"{place}: no such folder{hint}")
    cfg = load(None, ["data.reader=folder", f"data.root={args.data}", f"data.label_set={args.label_set}"])
    rounds = sorted(place.parent for place in Path(args.run).glob("rounds/*/checkpoint"))
    if not rounds:
        raise InputError(f"{args.run}: no round with a checkpoint in it; let the run finish, or name another with --run")
    learnt = {name for folder in rounds for name in read_table(str(folder / "labels.parquet"), ["name"])["name"].to_pylist()}
    dataset, predictor = build(cfg.data, cfg.run), Predictor.load(str(rounds[-1] / "checkpoint"))
    claims, rows, sizes = [], [], []
    for name, split in (("pool", "train"), ("val", "val")):
        items = [item for item in dataset.split(split) if item.name not in learnt][: 60 if args.quick else None]
        confusions, blanks = counted(dataset, items, predictor)
        sizes.append(f"{len(items)} images of {name}, their mIoU {np.nanmean(class_iou(confusions.sum(0))):.3f}")
        more_claims, more_rows = audited(name, confusions, blanks, 10 if args.quick else args.audits)
        claims, rows = claims + more_claims, rows + more_rows
    notes = (
        f"{'; '.join(sizes)}; none learnt from; {args.audits} audits of each size. The truth of an audit is the true mIoU over the classes "
        "that it knows. How intervals are made (expanded percentiles, and not BCa, which held the truth of the pool in 85 to 92%) was "
        "settled on the pool; val lies at other sites.\n\n"
        "| of | images | mIoU held | IoU of a class held | mean error | half of the interval | classes known |\n"
        + "\n".join(["|---|---|---|---|---|---|---|", *rows])
    )
    places = {"DATA": args.data, "RUN": args.run} | ({"WEIGHTS": args.weights} if args.weights else {})
    write("audit", "Audits of masks: intervals against the truth", claims, args.out, notes, places)


def main() -> None:
    try:
        run()
    except RaysalError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
