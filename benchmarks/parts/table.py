"""The tables, pictures and claims of a label-efficiency comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

RANDOM, BEST, FULL, LONG = "Random", "UEQ, 4 rounds", "Full supervision", "Full supervision, 6x steps"
TARGET = 0.9573
"""The paper's ratio of UEQ in 4 rounds to the official model."""

PAPER_FULL, PAPER_BEST, PAPER_RANDOM = 80.15, 76.73, 66.55
"""mIoU on S5Mars as published: the official model at 5,000 labels, UEQ and Random at 169."""


class Point(Protocol):
    @property
    def labels(self) -> int: ...
    @property
    def record(self) -> dict: ...


Found = Mapping[str, Sequence[Sequence[Point]]]
"""By row: by seed: its trainings, first labels first."""


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and 95% t interval of a few seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def low(self) -> float:
        """Lower end of the interval of the mean."""
        return self.mean - self.half

    @property
    def half(self) -> float:
        """Half the width of the interval of the mean."""
        n = len(self.values)
        return float(stats.t.ppf(0.975, n - 1) * self.sd / math.sqrt(n)) if n > 1 else math.nan

    def interval(self, sign: str = "") -> str:
        """Mean and half the width of its interval."""
        return f"{self.mean:{sign}.3f} ± {self.half:.3f}" if len(self.values) > 1 else f"{self.mean:{sign}.3f}"

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.sd:.3f}" if len(self.values) > 1 else f"{self.mean:.3f}"


def final(found: Found, row: str) -> Spread:
    """mIoU of a row's last training, by seed."""
    return Spread(tuple(points[-1].record["miou"] for points in found[row]))


def rest(found: Found, row: str) -> Spread | None:
    """mIoU of a row's last training on the pool's images that were not bought, by seed; None where all were."""
    values = [points[-1].record.get("rest") for points in found[row]]
    return Spread(tuple(v["miou"] for v in values)) if all(values) else None


def area(points: Sequence[Point]) -> float:
    """Mean height of a learning curve: the area under its straight pieces over the span of its labels."""
    x, y = [p.labels for p in points], [p.record["miou"] for p in points]
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(points) > 1 else y[0]


def relative(found: Found, row: str, to: str) -> Spread:
    """A row's mIoU over another's, by seed: both vary, and their interval holds that."""
    return Spread(tuple(a / b for a, b in zip(final(found, row).values, final(found, to).values, strict=True)))


def gain(found: Found, row: str, over: str) -> Spread:
    """Difference of two rows by seed: they share their first labels, so the seeds' luck cancels in part."""
    return Spread(tuple(a - b for a, b in zip(final(found, row).values, final(found, over).values, strict=True)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main_table(found: Found, paper: Mapping[str, float | None], full: Mapping[str, str | None]) -> str:
    """mIoU, what it is of full supervision, mIoU on the rest of the pool, the curve's area, the gain over Random, the paper's figure.

    Args:
        found: What was measured.
        paper: The published mIoU by row.
        full: By row, the row with all labels that trains as it does, or None.
    """
    rows = []
    for name, seeds in found.items():
        value, published = final(found, name), paper.get(name)
        better = gain(found, name, RANDOM) if RANDOM in found and name != RANDOM else None
        ceiling = full.get(name) if full.get(name) in found else None
        rows.append(
            [
                name,
                f"{seeds[0][-1].labels:,}",
                str(value),
                f"{100 * value.mean / final(found, ceiling).mean:.1f}%" if ceiling else "-",
                f"{better.mean:+.3f} ± {better.half:.3f}" if better else "-",
                str(rest(found, name) or "-"),
                f"{Spread(tuple(area(points) for points in seeds)).mean:.3f}" if len(seeds[0]) > 1 else "-",
                f"{published:.2f} ({100 * published / PAPER_FULL:.1f}%)" if published else "-",
            ]
        )
    return table(
        ["row", "labels", "mIoU", "of full, same recipe", "against Random (95%)", "rest of the pool", "curve", "paper (of its reference)"],
        rows,
    )


def pairs_table(found: Found, against: Mapping[str, Sequence[str]], draws: Sequence[str]) -> str:
    """Each row beside what it is to be compared with, draw by draw: differences on the measured images and on the rest of the pool, ratio.

    Args:
        found: What was measured.
        against: By row, the rows that it is compared with.
        draws: Names of the seeds (on folds: of seed and fold), in the order of ``found``.
    """
    rows = []
    for name, others in against.items():
        for other in others:
            if name not in found or other not in found or name == other:
                continue
            here, pair = gain(found, name, other), (rest(found, name), rest(found, other))
            there = Spread(tuple(a - b for a, b in zip(pair[0].values, pair[1].values, strict=True))) if pair[0] and pair[1] else None
            ratio = relative(found, name, other)
            beyond = f"{there.interval('+')} ({', '.join(f'{v:+.3f}' for v in there.values)})" if there else "-"
            rows.append([name, other, *(f"{v:+.3f}" for v in here.values), here.interval("+"), ratio.interval(), beyond])
    return table(["row", "against", *draws, "mean (95%)", "ratio (95%)", "rest of the pool: mean (95%) and draws"], rows) if rows else ""


def rows_of(found: Found, draws: Sequence[str]) -> dict[str, Any]:
    """Everything that the tables are made of, by row and draw, for other programs."""
    return {
        name: {
            draw: {
                "labels": [p.labels for p in points],
                "miou": [p.record["miou"] for p in points],
                "area": area(points),
                "iou": points[-1].record["iou"],
                "rest": points[-1].record.get("rest"),
                "class_images": points[-1].record["class_images"],
            }
            for draw, points in zip(draws, seeds, strict=True)
        }
        for name, seeds in found.items()
    }


def class_table(found: Found) -> str:
    """IoU of each class, mean over seeds; a class that no seed's truth or prediction holds is a dash."""
    classes = list(next(iter(found.values()))[0][-1].record["iou"])
    rows = []
    for name, seeds in found.items():
        values = [[p[-1].record["iou"][c] for p in seeds if p[-1].record["iou"][c] is not None] for c in classes]
        rows.append([name, *(f"{statistics.mean(v):.3f}" if v else "-" for v in values)])
    return table(["IoU", *classes], rows)


def bought_table(found: Found) -> str:
    """Labelled images that show each class, and of how many places they are; means over seeds."""
    classes = list(next(iter(found.values()))[0][-1].record["iou"])
    rows = []
    for name, seeds in found.items():
        last = [points[-1].record for points in seeds]
        if last[0]["labels"] == "all" and name != FULL:
            continue
        means = [statistics.mean(r["class_images"][c] for r in last) for c in classes]
        unseen = statistics.mean(sum(r["class_images"][c] == 0 for c in classes) for r in last)
        places = [statistics.mean(r[k] for r in last) for k in ("panoramas", "sites")]
        rows.append([name, *(f"{m:.1f}" for m in (*means, unseen, *places))])
    return table(["images with", *classes, "classes not seen", "panoramas", "sites"], rows)


def worth_table(found: Found, where: str = "val") -> str:
    """Whether a class gains where more of the labelled images show it: Spearman's rank correlations over rows that bought.

    Rows of one seed share their first labels, so that trainings are not independent: no p values, and once with each seed's mean taken out.
    """
    bought = [(k, points[-1].record) for seeds in found.values() for k, points in enumerate(seeds) if len(points) > 1]
    if len(bought) < 4:
        return ""
    classes, seeds_N = list(bought[0][1]["iou"]), np.array([k for k, _ in bought])
    images = {c: np.array([float(r["class_images"][c]) for _, r in bought]) for c in classes}
    rows = [["labelled images that show it", *(f"{images[c].mean():.1f} ± {images[c].std(ddof=1):.1f}" for c in classes)]]
    for place, told in ((where, [r for _, r in bought]), ("rest of the pool", [r.get("rest") for _, r in bought])):
        if not all(told):
            continue
        iou = {c: np.array([r["iou"][c] or 0.0 for r in told]) for c in classes}
        rows.append([f"with IoU on {place}", *(_correlation(images[c], iou[c]) for c in classes)])
        rows.append(["the same within seeds", *(_correlation(_within(images[c], seeds_N), _within(iou[c], seeds_N)) for c in classes)])
    return table([f"{len(bought)} trainings", *classes], rows)


def _within(values_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """Values less the mean of their group."""
    means = {g: values_N[groups_N == g].mean() for g in set(groups_N.tolist())}
    return (values_N - np.array([means[g] for g in groups_N.tolist()])).round(9)  # equal values stay equal


def _correlation(x_N: np.ndarray, y_N: np.ndarray) -> str:
    constant = min(np.ptp(x_N), np.ptp(y_N)) < 1e-12
    return "-" if constant else f"{stats.spearmanr(x_N, y_N).statistic:+.2f}"


def order(found: Found, paper: Mapping[str, float | None]) -> tuple[float, float]:
    """Spearman's rank correlation of the paper's rows with ours, and its two-sided p value."""
    rows = [name for name in found if paper.get(name)]
    if len(rows) < 3:
        return math.nan, math.nan
    answer = stats.spearmanr([final(found, r).mean for r in rows], [paper[r] for r in rows])
    return float(answer.statistic), float(answer.pvalue)


def curves(found: Found, file: Path, title: str) -> None:
    """Learning curves: means over seeds, one standard deviation, set side by side; full supervision as lines."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    bought = {n: s for n, s in found.items() if len(s[0]) > 1}
    colours = [f"C{i}" for i in range(10)] + ["olive", "navy", "crimson"]
    for i, ((name, seeds), colour) in enumerate(zip(bought.items(), colours, strict=False)):
        labels = np.array([p.labels for p in seeds[0]]) + 0.3 * (i - len(bought) / 2)
        heights = np.array([[p.record["miou"] for p in points] for points in seeds])
        mean, sd = heights.mean(0), heights.std(0, ddof=1) if len(seeds) > 1 else np.zeros(len(labels))
        style: dict[str, Any] = {"lw": 2.5} if name.startswith("UEQ") else {"lw": 1.2}
        style |= {"ls": "--", "color": "black"} if name == RANDOM else {"color": colour}
        axes.errorbar(labels, mean, sd, marker="o", label=name, ms=4, elinewidth=1, capsize=2, zorder=3 if name == RANDOM else 2, **style)
    for name, style_ in ((FULL, "--"), (LONG, ":")):
        if name in found:
            axes.axhline(final(found, name).mean, color="grey", ls=style_, label=name)
    axes.set(xlabel="labelled images (rows set side by side)", ylabel="mIoU on val", title=title)
    axes.set_xticks(sorted({p.labels for seeds in bought.values() for p in seeds[0]}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110)


def heat(found: Found, file: Path) -> None:
    """IoU by row and class."""
    classes = list(next(iter(found.values()))[0][-1].record["iou"])
    values = np.array([[np.mean([p[-1].record["iou"][c] or 0 for p in seeds]) for c in classes] for seeds in found.values()])
    figure = Figure(figsize=(8, 0.4 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="cividis", vmin=0, vmax=max(0.01, values.max()), aspect="auto")
    for (i, j), v in np.ndenumerate(values):
        axes.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=8, color="black" if v > 0.6 * values.max() else "white")
    axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.set_title("IoU, mean over seeds")
    figure.savefig(file, dpi=110)
