"""The charts of a folder of scores or labels: plain numbers and a theme in, a matplotlib Figure out.

Arrays carry shape suffixes: C classes, G columns of the class map, B bins, P precisions. NaN means "not known" everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from raysal.report.figures import Rgb, cells, class_height, legend
from raysal.report.theme import FULL, HALF, Theme, class_ticks, dress, figure, plain, readable_on

TICKS = 16
"""Columns of the class map that are named where there are many."""

NUMBERED_COLUMNS = 16


def histogram(
    edges: np.ndarray, counts_B: np.ndarray, marks: Mapping[str, float], name: str, limits: tuple[float, float] | None, theme: Theme
) -> Figure:
    """How many images have which number; `marks` are drawn as upright lines, the first of them strongest."""
    fig = figure(theme, HALF, 3.0)
    ax = dress(fig.subplots(), theme)
    ax.bar(edges[:-1], counts_B, width=np.diff(edges) * 0.92, align="edge", color=theme.series[0])
    for i, (label, at) in enumerate(marks.items()):
        strong = i == 0
        ax.axvline(
            at, color=theme.accent, linewidth=2 if strong else 1.2, linestyle="-" if strong else (0, (4, 3)), label=f"{label} {at:.3g}"
        )
    ax.set_xlim(*(limits or (float(edges[0]), float(edges[-1]))))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.set_xlabel(plain(name, 40))
    ax.set_ylabel("images")
    legend(ax, theme, 3)
    return fig


def share_bins(
    classes: Sequence[str], colors: Sequence[Rgb], images_CB: np.ndarray, mean_C: np.ndarray, names: Sequence[str], theme: Theme
) -> Figure:
    """Percent of the images in which a class covers so much, a row a class; its mean share stands on the right."""
    fig = figure(theme, FULL, class_height(classes))
    ax = dress(fig.subplots(), theme, grid=None)
    total_C = images_CB.sum(axis=1, keepdims=True)
    cells(ax, theme, np.divide(100 * images_CB, total_C, out=np.full(images_CB.shape, np.nan), where=total_C > 0), numbered=True)
    ax.set_xticks(range(len(names)), names)
    class_ticks(ax, theme, classes, colors)
    for i, mean in enumerate(mean_C):
        text = f"{100 * mean:.1f} %" if np.isfinite(mean) else "–"
        ax.annotate(text, (1.012, i), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=theme.ink, annotation_clip=False)
    ax.annotate("mean", (1.012, -0.75), xycoords=("axes fraction", "data"), fontsize=8.5, color=theme.muted, annotation_clip=False)
    ax.set_xlabel("share of an image that the class covers")
    return fig


def class_map(
    kind: str,
    labels: Sequence[str],
    classes: Sequence[str],
    colors: Sequence[Rgb],
    counts_G: np.ndarray,
    share_GC: np.ndarray,
    theme: Theme,
) -> Figure:
    """Heat map of mean class shares in percent: a row a class, a column a place; above it how many images each column stands for."""
    fig = figure(theme, FULL, class_height(classes) + 1.5)
    top, ax = fig.subplots(2, 1, height_ratios=(1, max(2.5, 0.42 * len(classes))), sharex=True)
    few = len(labels) <= NUMBERED_COLUMNS
    top.bar(range(len(labels)), counts_G, width=0.86, color=theme.series[0])
    dress(top, theme).set_ylabel("images")
    top.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    top.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    top.tick_params(labelbottom=False)
    dress(ax, theme, grid=None)
    percent_CG, cmap = 100 * share_GC.T, theme.colormap()
    norm = PowerNorm(0.5, 0, max(1.0, float(np.nanmax(percent_CG))))  # a class that covers little is still told from one that is absent
    picture = ax.imshow(np.ma.masked_invalid(percent_CG), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    for spine in ax.spines.values():
        spine.set_visible(False)
    if few:
        for (row, column), value in np.ndenumerate(percent_CG):
            missing = not np.isfinite(value)
            color = theme.muted if missing else readable_on(cmap(norm(value)))
            text = "n/a" if missing else ("0" if value < 0.5 else f"{value:.0f}")
            ax.text(column, row, text, ha="center", va="center", fontsize=8.5, color=color)
    shown = range(len(labels)) if few else sorted({*np.linspace(0, len(labels) - 1, TICKS).round().astype(int).tolist()})
    ax.set_xticks(list(shown), [plain(labels[i]) for i in shown], rotation=45, ha="right", rotation_mode="anchor")
    class_ticks(ax, theme, classes, colors)
    ax.set_xlabel(kind)
    bar = fig.colorbar(picture, ax=[top, ax], pad=0.01, fraction=0.025)
    bar.ax.spines["outline"].set_visible(False)
    bar.ax.tick_params(labelcolor=theme.ink, labelsize=9, length=0)
    bar.set_label("mean share of the images (%)", color=theme.muted, fontsize=9.5)
    return fig


def coverage(
    wanted_P: np.ndarray,
    kept_P: np.ndarray,
    in_use: tuple[float, float, float] | None,
    audited: Sequence[tuple[float, float]],
    theme: Theme,
) -> Figure:
    """Share of pixels that keep a class against the share of right ones wanted, both in 0..1.

    Args:
        wanted_P, kept_P: The curve on the val split.
        in_use: (wanted, kept on val, kept in this archive) where thresholds are in use.
        audited: (right, kept) on audited images, a point for each precision that thresholds were settled for.
        theme: How it looks.
    """
    fig = figure(theme, FULL, 3.8)
    ax = dress(fig.subplots(), theme, grid="both")
    ax.plot(100 * wanted_P, 100 * kept_P, color=theme.series[0], linewidth=2.4, label="val: thresholds set and measured there")
    if audited:
        right, kept = np.array(audited).T
        ax.scatter(
            100 * right,
            100 * kept,
            s=60,
            marker="D",
            color=theme.series[2],
            edgecolor=theme.card,
            zorder=4,
            label="audit: random images of the archive",
        )
    if in_use is not None:
        wanted, on_val, here = (100 * v for v in in_use)
        ax.axvline(wanted, color=theme.accent, linewidth=1.6, linestyle=(0, (5, 3)), label=f"in use: {wanted:g} %")
        if np.isfinite(on_val):
            ax.scatter([wanted], [on_val], s=70, color=theme.series[0], edgecolor=theme.card, zorder=5)
        if np.isfinite(here):
            ax.scatter(
                [wanted], [here], s=90, marker="_", linewidth=3, color=theme.accent, zorder=5, label=f"kept in this archive: {here:.0f} %"
            )
    ax.set_xlim(min(50.0, *(100 * r - 1 for r, _ in audited), 50.0), 100)
    ax.set_ylim(0, 102)
    ax.set_xlabel("share of right pixels wanted, in each class (%)")
    ax.set_ylabel("pixels that keep a class (%)")
    legend(ax, theme, 2)
    return fig
