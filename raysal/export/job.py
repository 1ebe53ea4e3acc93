"""What all formats share: the rows to write, read in small batches and converted on threads, and an account of them."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysal.archive.tables import scan_table
from raysal.archive.uris import join, write_stream
from raysal.errors import ImageError, InputError
from raysal.export.names import Names
from raysal.export.newest import Newest
from raysal.images.masks import decode_mask
from raysal.labels import IGNORE, LabelSet

T = TypeVar("T")

COLUMNS = (
    "id", "uri", "status", "width", "height", "mask_png", "confidence", "abstained", "class_fractions", "source_sha256", "model_digest",
)  # fmt: skip
"""What is read of a labels table."""

BATCH_ROWS = 32
"""Rows in memory at a time, with their masks."""

SURVEY_ROWS = 4096
"""The same where only a few small columns are read."""

Progress = Callable[[int, int], None]
"""Called as on_progress(images done, images in all), on the caller's thread."""


@dataclass(frozen=True)
class Labelled:
    """An image and its mask, checked.

    Attributes:
        name: The file name that the export gives it, without the mask's extension.
        mask_HW: uint8 class ids, 255 = no class.
        pixels_C: Pixels of each class.
        row: The columns of the labels table (`COLUMNS`).
    """

    id: str
    uri: str
    name: str
    mask_HW: np.ndarray
    pixels_C: np.ndarray
    row: dict[str, Any]

    @property
    def classes(self) -> list[int]:
        """Class ids that the mask shows."""
        return [int(c) for c in np.flatnonzero(self.pixels_C)]


@dataclass
class Job:
    """One export. Formats call `each` once and write what it gives.

    Attributes:
        labels: The labels table.
        out: Folder to write to.
        label_set: What the class ids mean.
        names: Shown every image that is to be written.
        total: How many these are.
        only: Ids to write, None for all.
        newest: Shown every row that is asked for.
        image_root: Where the annotation tool finds the images, in place of the folder that they share.
        with_images: Whether image files go into the output.
        max_bytes: Limit of image files, beside what their size in pixels explains.
        left_out: Images not written, by reason.
        written: Images written.
        files: Files written that a person will look for, below `out`.
        digests: Of the models that made the masks.
        warnings: What the user should know.
    """

    labels: str
    out: str
    label_set: LabelSet
    names: Names
    total: int
    only: pa.Array | None = None
    newest: Newest | None = None
    image_root: str | None = None
    with_images: bool = False
    max_bytes: int = 0
    on_progress: Progress | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    written: int = 0
    files: list[str] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def each(self, convert: Callable[[Labelled], T]) -> Iterator[tuple[Labelled, T]]:
        """Every image to write, in the table's order, with what `convert` makes of it.

        Args:
            convert: Called on threads. An ImageError from it leaves the image out, with its status as the reason.

        Raises:
            InputError: A mask holds class ids that the label set does not have.
        """
        done = 0
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), "export") as pool:
            for batch in scan_table(self.labels, COLUMNS, BATCH_ROWS):
                rows = usable(asked(batch, self.only, self.newest)).to_pylist()
                names = [self.names.of(row["id"], row["uri"]) for row in rows]
                for found in pool.map(lambda row, name: self._converted(row, name, convert), rows, names):
                    if isinstance(found, ImageError):
                        self.left_out[found.status] += 1
                        continue
                    self.written += 1
                    self.digests.add(found[0].row["model_digest"] or "")
                    yield found
                done += len(rows)
                if self.on_progress is not None and rows:
                    self.on_progress(done, self.total)

    @contextlib.contextmanager
    def name_table(self) -> Iterator[Callable[[Labelled, str], None]]:
        """Writes ``names.csv``: call what it gives with each image and the file, below the output folder, that its mask is in."""
        with write_stream(join(self.out, "names.csv")) as file:
            file.write(csv_line("name", "id", "uri", "file"))

            def note(image: Labelled, where: str) -> None:
                file.write(csv_line(image.name, image.id, image.uri, where))

            yield note
        self.files.append("names.csv")

    def _converted(self, row: dict[str, Any], name: str, convert: Callable[[Labelled], T]) -> tuple[Labelled, T] | ImageError:
        try:
            image = self._labelled(row, name)
            return image, convert(image)
        except ImageError as error:
            return error

    def _labelled(self, row: dict[str, Any], name: str) -> Labelled:
        size = row["height"], row["width"]
        if row["mask_png"] is None or None in size:
            raise ImageError("mask", f"{row['uri']}: status ok, but no mask")
        try:
            mask_HW = decode_mask(row["mask_png"], max(1, size[0] * size[1]), row["uri"])
        except ImageError as error:
            raise ImageError("mask", str(error)) from error
        if mask_HW.shape != size:
            raise ImageError("mask", f"{row['uri']}: its mask is {mask_HW.shape} pixels, the table says {size}")
        n, counts = self.label_set.n_classes, np.bincount(mask_HW.ravel(), minlength=256)
        if counts[n:IGNORE].any():
            raise InputError(
                f"{self.labels}: the mask of {row['uri']} holds class {int(np.flatnonzero(counts[n:IGNORE])[0]) + n}, but the label set "
                f"{self.label_set.name!r} ends at {n - 1}; give the one that the model was made for with --classes"
            )
        return Labelled(row["id"], row["uri"], name, mask_HW, counts[:n], row)


def asked(batch: pa.RecordBatch, only: pa.Array | None, newest: Newest | None = None) -> pa.RecordBatch:
    """The rows of a batch whose ids are asked for, without those that a newer row of their image superseded."""
    rows = batch if only is None else batch.filter(pc.is_in(batch["id"], only))
    return rows if newest is None else newest.only(rows)


def usable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of a batch that have a mask."""
    return batch.filter(pc.equal(batch["status"], "ok"))


def parts(items: Iterable[T], weight: Callable[[T], int], limit: int) -> Iterator[tuple[int, Iterator[T]]]:
    """Cuts a stream into numbered streams whose weights add up to a limit at most; a heavier item goes alone. Nothing is held."""
    number = weighed = 0

    def number_of(item: T) -> int:
        nonlocal number, weighed
        if weighed and weighed + weight(item) > limit:
            number, weighed = number + 1, 0
        weighed += weight(item)
        return number

    return itertools.groupby(items, number_of)


def csv_line(*values: str) -> bytes:
    """One line of CSV, quoted where needed; its line ends are CSV's own, as else a lone carriage return would go unquoted."""
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue().encode()
