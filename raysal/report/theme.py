"""How figures look: one light and one dark theme, colours that readers with colour-blindness can tell apart."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory, offset_copy
from matplotlib.typing import ColorType

DPI = 160
FULL, HALF = 10.4, 5.1
"""Widths in inches of a figure over the page's whole width and of one of two beside each other."""


@dataclass(frozen=True)
class Theme:
    """Colours of one theme; `card` is the page's own background under figures.

    `series` are Okabe and Ito's colours, lightened on dark ground; `ramp` runs from "nothing" to "much" in one hue.
    """

    name: str
    card: str
    ink: str
    muted: str
    grid: str
    accent: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]

    def colormap(self) -> Colormap:
        """The ramp; what has no value is drawn as the card's ground."""
        return LinearSegmentedColormap.from_list(self.name, list(self.ramp)).with_extremes(bad=self.card)


LIGHT = Theme(
    "light", "#ffffff", "#221e1a", "#6f675f", "#e7e1d9", "#b3461b",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#6b6b6b"),
    ("#f6f2ec", "#a9cbe3", "#3d87bd", "#0b4a7d", "#06294a"),
)  # fmt: skip
DARK = Theme(
    "dark", "#221e1b", "#efe9e2", "#a79d92", "#3b352f", "#f2935f",
    ("#5db4ea", "#f58a4b", "#2fc79a", "#e29cc4", "#f2b83c", "#a6d8f5", "#d9bd4f", "#a9a9a9"),
    ("#2c2723", "#234d6b", "#2f7fb3", "#79bfe9", "#d8f0ff"),
)  # fmt: skip
THEMES = (LIGHT, DARK)


def figure(theme: Theme, width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of the theme; drawn by Agg, so no display and no global state."""
    fig = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.card, layout=layout)
    FigureCanvasAgg(fig)
    return fig


def dress(ax: Axes, theme: Theme, grid: str | None = "y") -> Axes:
    """Gives axes the theme's lines and text."""
    ax.set_facecolor(theme.card)
    ax.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=9, length=0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
        label.set_color(theme.muted)
        label.set_fontsize(9.5)
    if grid:
        ax.grid(axis=grid, color=theme.grid, linewidth=0.8)  # type: ignore[arg-type]
        ax.set_axisbelow(True)
    return ax


def plain(text: object, most: int = 24) -> str:
    """Text from files as matplotlib may draw it: one line, no mathematics, not endless."""
    clean = "".join(c if c.isprintable() else " " for c in str(text))
    clean = clean if len(clean) <= most else clean[: most - 1] + "…"
    return clean.replace("$", r"\$")


def class_ticks(ax: Axes, theme: Theme, classes: Sequence[str], colors: Sequence[tuple[int, int, int]]) -> None:
    """Names the rows 0..n-1 of axes by class, each with a chip of its colour between name and axes."""
    ax.set_yticks(range(len(classes)), [plain(c, 18) for c in classes])
    ax.tick_params(axis="y", pad=19)
    where = offset_copy(blended_transform_factory(ax.transAxes, ax.transData), ax.get_figure(root=True), x=-10, units="points")
    for i, rgb in enumerate(colors):
        ax.plot(
            [0], [i], marker="s", markersize=7.5, color=tuple(v / 255 for v in rgb), markeredgecolor=theme.muted,
            markeredgewidth=0.6, transform=where, clip_on=False, linestyle="none",
        )  # fmt: skip


def readable_on(color: ColorType) -> str:
    """Black or white, whichever reads on the colour (relative luminance of WCAG 2)."""
    rgb = np.asarray(to_rgb(color), dtype=np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "#ffffff" if float(linear @ [0.2126, 0.7152, 0.0722]) < 0.2 else "#111111"


def png(fig: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class may be named in a script that the font lacks
        fig.savefig(buffer, format="png", metadata={"Software": "raysal"})
    return buffer.getvalue()
