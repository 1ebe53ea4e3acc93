"""Masks as PNG files: class ids as they are, or with the label set's colours as palette."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

from raysal.archive.uris import join, write_bytes
from raysal.export.job import Job, Labelled
from raysal.labels import IGNORE


def write_index(job: Job) -> None:
    """One-channel PNGs of class ids, byte for byte those of the table; 255 = no class."""
    _write(job, lambda image: image.row["mask_png"])


def write_colour(job: Job) -> None:
    """Palette PNGs: programs show the label set's colours (no class: black), and the number behind a pixel is still its class id."""
    palette = job.label_set.palette()
    _write(job, lambda image: palette_png(image.mask_HW, palette))


def palette_png(index_HW: np.ndarray, palette: np.ndarray) -> bytes:
    """A palette PNG of 8 bits a pixel.

    Args:
        index_HW: uint8.
        palette: uint8 [up to 256, 3] RGB.
    """
    image = Image.fromarray(np.ascontiguousarray(index_HW))
    image.putpalette(palette.astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", bits=8)
    return file.getvalue()


def _write(job: Job, encode: Callable[[Labelled], bytes]) -> None:
    def put(image: Labelled) -> str:
        file = f"masks/{image.name}.png"
        write_bytes(join(job.out, file), encode(image))
        return file

    # The files hold class ids, whatever values the data set's own mask files have.
    label_set = replace(job.label_set, values=tuple(range(job.label_set.n_classes)), null_values=(IGNORE,))
    write_bytes(join(job.out, "classes.json"), (json.dumps(label_set.to_dict(), indent=1) + "\n").encode())
    job.files += ["masks", "classes.json"]
    with job.name_table() as note:
        for image, file in job.each(put):
            note(image, file)
