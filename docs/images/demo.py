"""Draws docs/images/demo.png from a run: scenes of val, their ground truth, and the masks after each round.

python docs/images/demo.py runs/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from raysal.config import load
from raysal.datasets.build import build
from raysal.model.runtime import Predictor

COLUMNS = 8


def main(run: str) -> None:
    cfg = load(Path(run) / "config.yaml")
    dataset = build(cfg.data, run)
    # The scenes with most classes, so that every class is seen.
    val = dataset.split("val")
    images = [dataset.image(item) for item in val]
    masks = [dataset.mask(item, image.shape[:2]) for item, image in zip(val, images, strict=True)]
    best = sorted(range(len(val)), key=lambda i: -len(np.unique(masks[i])))[:COLUMNS]
    rows = [("scene", [images[i] for i in best]), ("truth", [dataset.label_set.colorize(masks[i]) for i in best])]
    for folder in sorted((Path(run) / "rounds").iterdir()):
        metrics = json.loads((folder / "metrics.json").read_text())
        predicted = Predictor.load(str(folder / "checkpoint")).predict([images[i] for i in best]).masks
        rows.append((f"{metrics['labels']} labels\nmIoU {metrics['miou']:.2f}", [dataset.label_set.colorize(m) for m in predicted]))
    figure, axes = plt.subplots(len(rows), COLUMNS, figsize=(1.5 * COLUMNS, 1.5 * len(rows) + 0.5))
    for row, (title, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title, fontsize=11)
    names = zip(dataset.label_set.classes, dataset.label_set.colors, strict=True)
    handles = [Patch(color=np.array(color) / 255, label=name) for name, color in names]
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False, fontsize=10)
    figure.subplots_adjust(left=0.06, right=0.995, top=0.99, bottom=0.07, wspace=0.04, hspace=0.04)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main(sys.argv[1])
