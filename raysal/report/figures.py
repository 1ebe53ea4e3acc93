"""The charts. Each function takes plain numbers and a theme and gives a matplotlib Figure; none knows the run folder.

Arrays carry shape suffixes: R rounds, C classes, T log lines. NaN means "not measured" everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from raysal.report.theme import FULL, HALF, Theme, class_ticks, dress, figure, plain, readable_on

Rgb = tuple[int, int, int]


def learning_curve(labels_R: np.ndarray, miou_R: np.ndarray, pool: int | None, full_miou: float | None, theme: Theme) -> Figure:
    """Val mIoU (percent) against labels bought; full supervision as a line, and the share of it on the right."""
    fig = figure(theme, FULL, 4.0)
    ax = dress(fig.subplots(), theme)
    percent_R = miou_R * 100
    ax.plot(labels_R, percent_R, color=theme.accent, linewidth=2.4, marker="o", markersize=7, markeredgecolor=theme.card, zorder=3)
    for x, y in zip(labels_R, percent_R, strict=True):
        ax.annotate(f"{y:.1f}", (x, y), (-5, 8), textcoords="offset points", ha="center", color=theme.ink, fontsize=9.5, weight="bold")
    low, high = float(np.nanmin(percent_R)), float(np.nanmax(percent_R))
    if full_miou:
        full = full_miou * 100
        low, high = min(low, full), max(high, full)
        ax.axhline(full, color=theme.series[0], linewidth=1.6, linestyle=(0, (5, 3)))
        ax.annotate(
            f"full supervision {full:.1f}", (0.005, full), (0, -5), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=theme.series[0], fontsize=9.5, va="top",
        )  # fmt: skip
        share = ax.secondary_yaxis("right", functions=(partial(np.multiply, 100 / full), partial(np.multiply, full / 100)))
        share.set_ylabel("share of full supervision (%)", color=theme.muted, fontsize=9.5)
        share.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=9, length=0)
        share.spines["right"].set_visible(False)
    margin = max(2.0, (high - low) * 0.18)
    ax.set_ylim(max(0.0, low - margin), min(104.0, high + margin))
    reach = max(float(np.ptp(labels_R)) * 0.06, 1.0)
    ax.set_xlim(float(labels_R.min()) - reach, float(labels_R.max()) + reach)
    if len(labels_R) <= 10:
        ax.set_xticks(labels_R, [f"{int(n)}\n{100 * n / pool:.3g} %" if pool else f"{int(n)}" for n in labels_R])
    ax.set_xlabel("labels bought (images)" + (", and their share of the pool" if pool else ""))
    ax.set_ylabel("val mIoU (%)")
    return fig


def class_height(classes: Sequence[str]) -> float:
    """Inches of a figure with a row a class; the same for all, as they stand side by side."""
    return max(2.6, 0.42 * len(classes) + 1.2)


def class_iou(rounds: Sequence[str], classes: Sequence[str], colors: Sequence[Rgb], iou_RC: np.ndarray, theme: Theme) -> Figure:
    """Heat map of IoU in percent, a row a class, a column a round; the numbers stand in the cells."""
    wide = len(rounds) > 7
    fig = figure(theme, FULL if wide else HALF, class_height(classes))
    ax = dress(fig.subplots(), theme, grid=None)
    percent_CR = iou_RC.T * 100
    cells(ax, theme, percent_CR, numbered=len(rounds) <= 16)
    ax.set_xticks(range(len(rounds)), [plain(r, 12) for r in rounds], fontsize=9 if len(rounds) <= 16 else 6.5)
    class_ticks(ax, theme, classes, colors)
    ax.set_xlabel("round (labels bought)")
    return fig


def confusion(classes: Sequence[str], colors: Sequence[Rgb], counts_CC: np.ndarray, theme: Theme) -> Figure:
    """Rows: what the expert said; columns: what the model said; percent of the row's pixels.

    Raises:
        ValueError: The matrix has not one row and one column for each class.
    """
    n = len(classes)
    if counts_CC.shape != (n, n):
        raise ValueError(f"a confusion matrix of shape {counts_CC.shape} for {n} classes")
    fig = figure(theme, HALF, 4.9)
    ax = dress(fig.subplots(), theme, grid=None)
    rows_C = counts_CC.sum(axis=1, keepdims=True)
    percent_CC = np.divide(100 * counts_CC, rows_C, out=np.full(counts_CC.shape, np.nan), where=rows_C > 0)
    cells(ax, theme, percent_CC, numbered=n <= 14)
    ax.set_xticks(range(n), [plain(c, 12) for c in classes], rotation=45, ha="right", rotation_mode="anchor")
    class_ticks(ax, theme, classes, colors)
    ax.set_xlabel("the model says")
    ax.set_ylabel("the expert says")
    return fig


def cells(ax: Axes, theme: Theme, percent: np.ndarray, numbered: bool) -> None:
    """Draws percentages as coloured cells; cells without a value stay empty and say n/a."""
    cmap = theme.colormap()
    ax.imshow(np.ma.masked_invalid(percent), cmap=cmap, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    height, width = percent.shape
    ax.set_xticks(np.arange(-0.5, width), minor=True)
    ax.set_yticks(np.arange(-0.5, height), minor=True)
    ax.grid(which="minor", color=theme.card, linewidth=2)
    ax.tick_params(which="minor", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if not numbered:
        return
    for (row, column), value in np.ndenumerate(percent):
        missing = not np.isfinite(value)
        color = theme.muted if missing else readable_on(cmap(value / 100))
        text = "n/a" if missing else ("0" if value < 0.5 else f"{value:.0f}")
        ax.text(column, row, text, ha="center", va="center", fontsize=8.5, color=color)


def reliability(counts_B: np.ndarray, accuracy_B: np.ndarray, confidence_B: np.ndarray, ece: float, theme: Theme) -> Figure:
    """Share of right pixels against stated confidence in B bins, above the share of pixels in each bin."""
    fig = figure(theme, HALF, 4.9)
    top, bottom = fig.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    used = (counts_B > 0) & np.isfinite(accuracy_B) & np.isfinite(confidence_B)
    dress(top, theme, grid="both")
    top.plot([0, 1], [0, 1], color=theme.muted, linestyle=(0, (4, 3)), linewidth=1.2)
    top.plot(confidence_B[used], accuracy_B[used], color=theme.accent, marker="o", markersize=6, linewidth=2, markeredgecolor=theme.card)
    top.text(0.03, 0.95, "above the line: better than it says", color=theme.muted, fontsize=9, va="top")
    top.text(0.98, 0.04, "below the line: too sure of itself", color=theme.muted, fontsize=9, ha="right")
    if np.isfinite(ece):
        top.set_title(f"calibration error (ECE) {100 * ece:.1f} %", loc="left", color=theme.muted, fontsize=9.5)
    top.set_ylim(0, 1)
    top.set_ylabel("share that is right")
    dress(bottom, theme)
    n = len(counts_B)
    share_B = 100 * counts_B / max(float(counts_B.sum()), 1.0)
    bottom.bar((np.arange(n) + 0.5) / n, share_B, width=0.86 / n, color=theme.series[0])
    bottom.set_ylabel("pixels (%)")
    bottom.set_xlabel("the model's confidence")
    bottom.set_xlim(0, 1)
    return fig


def intervals(
    names: Sequence[str], colors: Sequence[Rgb], value_N: np.ndarray, low_N: np.ndarray, high_N: np.ndarray, theme: Theme
) -> Figure:
    """Estimates in 0..1 (percent on the axis) with the interval that each is known to; NaN: not known."""
    fig = figure(theme, HALF, class_height(names))
    ax = dress(fig.subplots(), theme, grid="x")
    y = np.arange(len(names))
    ax.hlines(y, 100 * low_N, 100 * high_N, color=[tuple(c / 255 for c in color) for color in colors], linewidth=5, alpha=0.75)
    ax.scatter(100 * value_N, y, s=46, color=theme.accent, edgecolor=theme.card, zorder=3)
    for i, value in enumerate(value_N):
        text = f"{100 * value:.0f}" if np.isfinite(value) else "n/a"
        ax.annotate(text, (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=theme.ink, annotation_clip=False)
    ax.set_yticks(y, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, 100)
    ax.set_xlabel("IoU (%), estimated, with its 95 % interval")
    return fig


def class_balance(
    classes: Sequence[str],
    colors: Sequence[Rgb],
    bought_C: np.ndarray,
    pool_C: np.ndarray | None,
    images_C: np.ndarray,
    theme: Theme,
    wide: bool,
) -> Figure:
    """Share of each class (percent, log axis) in the masks bought and, as predicted, in the pool.

    Args:
        classes, colors: Of the label set.
        bought_C: Pixels bought, in any unit; images_C: bought images that hold the class, or NaN.
        pool_C: Predicted share in the pool, in 0..1, or None.
        theme, wide: How it looks; wide is over the page's whole width.
    """
    fig = figure(theme, FULL if wide else HALF, class_height(classes))
    ax = dress(fig.subplots(), theme, grid="x")
    floor = 0.01  # percent; the log axis has no place for zero
    y = np.arange(len(classes))
    bought = np.clip(100 * bought_C / max(float(np.nansum(bought_C)), 1.0), floor, 100)
    if pool_C is not None:
        pool = np.clip(100 * pool_C, floor, 100)
        ax.hlines(y, np.minimum(bought, pool), np.maximum(bought, pool), color=theme.grid, linewidth=3.5)
        ax.scatter(pool, y, s=48, facecolor=theme.card, edgecolor=theme.series[0], linewidth=1.8, zorder=3, label="pool, as predicted")
    ax.scatter(bought, y, s=52, color=theme.accent, zorder=4, label="labels bought")
    for i, n in enumerate(images_C):
        if np.isfinite(n):
            ax.annotate(
                f"{int(n)}",
                (1.02, i),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8.5,
                color=theme.muted,
                annotation_clip=False,
            )
    ax.annotate("images", (1.02, -0.85), xycoords=("axes fraction", "data"), fontsize=8.5, color=theme.muted, annotation_clip=False)
    ax.set_xscale("log")
    ax.set_xlim(floor * 0.8, 130)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"≤ {v:g}" if v <= floor else f"{v:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(len(classes) - 0.5, -0.5)
    class_ticks(ax, theme, classes, colors)
    ax.set_xlabel("share of pixels (%, each step is ten times more)")
    legend(ax, theme, 2)
    return fig


def legend(ax: Axes, theme: Theme, columns: int) -> None:
    """A legend above the axes, where it covers nothing."""
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False, fontsize=9, labelcolor=theme.ink,
        handlelength=1.4, handletextpad=0.5, columnspacing=1.1, borderaxespad=0.2,
    )  # fmt: skip


def losses(steps_T: np.ndarray, terms: Mapping[str, np.ndarray], theme: Theme) -> Figure:
    """The terms of the loss against training steps; thin lines as logged, thick ones a running mean."""
    fig = figure(theme, HALF, 3.7)
    ax = dress(fig.subplots(), theme)
    window = max(1, len(steps_T) // 20)
    for i, (name, values_T) in enumerate(terms.items()):
        color = theme.series[i % len(theme.series)]
        ax.plot(steps_T, values_T, color=color, linewidth=0.8, alpha=0.35)
        ax.plot(
            *_running_mean(steps_T, values_T, window),
            color=color,
            linewidth=2,
            label=plain(name, 30),
            linestyle=("-", "--", "-.", ":")[i % 4],
        )
    ax.set_xlabel("training step")
    ax.set_ylabel("loss")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend(ax, theme, 2)
    return fig


def _running_mean(steps_T: np.ndarray, values_T: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    kept = np.isfinite(values_T)
    steps_T, values_T = steps_T[kept], values_T[kept]
    if len(values_T) < window:
        return steps_T, values_T
    kernel = np.ones(window) / window
    return np.convolve(steps_T, kernel, "valid"), np.convolve(values_T, kernel, "valid")


def agreement(steps_T: np.ndarray, classes: Sequence[str], colors: Sequence[Rgb], agreement_TC: np.ndarray, theme: Theme) -> Figure:
    """Heat map over training: how far the two branches give each class to the same pixels (percent)."""
    fig = figure(theme, HALF, 3.7)
    ax = dress(fig.subplots(), theme, grid=None)
    cmap = theme.colormap()
    first, last = float(steps_T[0]), float(steps_T[-1])
    extent = (first, last if last > first else first + 1, len(classes) - 0.5, -0.5)
    picture = ax.imshow(
        np.ma.masked_invalid(100 * agreement_TC.T), cmap=cmap, vmin=0, vmax=100, aspect="auto", interpolation="nearest", extent=extent
    )
    bar = fig.colorbar(picture, ax=ax, pad=0.02, fraction=0.05)
    bar.ax.spines["outline"].set_visible(False)
    bar.ax.tick_params(labelcolor=theme.ink, labelsize=9, length=0)
    bar.set_label("agreement of the branches (%)", color=theme.muted, fontsize=9.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    class_ticks(ax, theme, classes, colors)
    ax.set_xlabel("training step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return fig


def seconds(names: Sequence[str], stages: Sequence[str], seconds_RS: np.ndarray, theme: Theme) -> Figure:
    """Where the time went: one bar a round, cut into stages S."""
    fig = figure(theme, HALF, max(2.4, min(0.42 * len(names), 7.0) + 1.5))
    ax = dress(fig.subplots(), theme, grid="x")
    unit, name = (60.0, "minutes") if seconds_RS.sum(axis=1).max() > 180 else (1.0, "seconds")
    left = np.zeros(len(names))
    for s, stage in enumerate(stages):
        ax.barh(
            range(len(names)), seconds_RS[:, s] / unit, left=left, height=0.66, label=plain(stage),
            color=theme.series[s % len(theme.series)], edgecolor=theme.card, linewidth=0.8, hatch="///" if s >= len(theme.series) else None,
        )  # fmt: skip
        left += seconds_RS[:, s] / unit
    for i, total in enumerate(left):
        ax.annotate(f"{total:.3g}", (total, i), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=theme.muted)
    ax.set_yticks(range(len(names)), [plain(n) for n in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.margins(x=0.09)
    ax.set_xlabel(f"{name} of work")
    legend(ax, theme, 6)
    return fig


def throughput(stages: Sequence[str], rates_S: np.ndarray, theme: Theme) -> Figure:
    """Images per second of each stage, in the last round that measured it."""
    fig = figure(theme, HALF, max(2.4, 0.5 * len(stages) + 1.2))
    ax = dress(fig.subplots(), theme, grid="x")
    ax.barh(range(len(stages)), rates_S, height=0.6, color=theme.series[0])
    for i, rate in enumerate(rates_S):
        ax.annotate(f"{rate:.3g}", (rate, i), (4, 0), textcoords="offset points", va="center", fontsize=9.5, color=theme.ink)
    ax.set_yticks(range(len(stages)), [plain(s) for s in stages])
    ax.set_ylim(len(stages) - 0.4, -0.6)
    ax.margins(x=0.12)
    ax.set_xlabel("images per second")
    return fig
