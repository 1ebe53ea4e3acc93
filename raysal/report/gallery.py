"""The page's picture galleries as PNG files, for slides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from raysal.archive.uris import join, write_bytes
from raysal.labels import LabelSet
from raysal.report.asked import Labeled, Request
from raysal.report.charts import Easel
from raysal.report.examples import Example, Examples
from raysal.report.pictures import heat, shrink
from raysal.report.sections import Desk
from raysal.report.theme import FULL, LIGHT, Theme, figure, plain, png
from raysal.words import percent, significant


def write_sheets(desk: Desk, seen: Examples | None, asked: list[Request], masks: list[Labeled]) -> None:
    """The page's picture galleries as PNG files too, for slides."""

    for name, rows_ in (("best", seen.best), ("worst", seen.worst)) if seen else ():
        tiles = [tile for e in rows_ for tile in _strip(e, desk.label_set, seen.top if seen else 1)]
        write_tiles(desk, f"val_{name}", tiles, 4, ("image", "expert's truth", "model's mask", "uncertainty"))
    for request in asked:
        write_tiles(
            desk, f"asked_round_{request.round:03d}",
            [(i.picture, f"#{i.rank}  {significant(i.score)}") for i in request.images if not isinstance(i.picture, str)], 6,
        )  # fmt: skip
    write_tiles(desk, "pool_masks", [(m.picture, m.name) for m in masks if not isinstance(m.picture, str)], 6)


def write_tiles(easel: Easel, name: str, tiles: Sequence[tuple[np.ndarray, str]], columns: int, headings: tuple[str, ...] = ()) -> None:
    """One gallery as a PNG file beside the page; nothing where there are no pictures."""
    if tiles:
        uri = join(easel.folder, f"{name}.png")
        easel.notes.attempt(uri, lambda: write_bytes(uri, png(sheet(tiles, columns, LIGHT, headings))), None)


def _strip(example: Example, classes: LabelSet, top: float) -> list[tuple[np.ndarray, str]]:
    drawn = heat(example.uncertainty, top) if example.uncertainty is not None else shrink(example.image, 1)
    name = f"{example.item.name}: {percent(example.miou)}"
    return [(example.image, name), (classes.colorize(example.truth), ""), (classes.colorize(example.mask), ""), (drawn, "")]


def sheet(tiles: Sequence[tuple[np.ndarray, str]], columns: int, theme: Theme, headings: Sequence[str] = ()) -> Figure:
    """A contact sheet of pictures uint8 [H, W, 3], each under a line of text; headings stand over the columns."""
    rows, top, side, text = -(-len(tiles) // columns), 0.4 if headings else 0.1, FULL / columns, 0.24
    height = top + rows * (side + text)
    fig = figure(theme, FULL, height, layout=None)
    for column, heading in enumerate(headings):
        fig.text((column + 0.02) / columns, 1 - 0.2 / height, plain(heading), fontsize=10, weight="bold", color=theme.ink, va="center")
    for i, (picture, line) in enumerate(tiles):
        row, column = divmod(i, columns)
        bottom = height - top - (row + 1) * (side + text)
        ax = fig.add_axes((column / columns + 0.004, bottom / height, 1 / columns - 0.008, side / height - 0.004))
        ax.imshow(picture)
        ax.set_axis_off()
        fig.text(
            (column + 0.02) / columns,
            (bottom + side + text / 2) / height,
            plain(line, 160 // columns),
            fontsize=8.5,
            color=theme.muted,
            va="center",
        )
    return fig
