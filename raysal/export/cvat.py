"""CVAT's "Segmentation mask 1.1": zip files that its "Upload annotations" takes.

A zip holds ``labelmap.txt``, ``ImageSets/Segmentation/default.txt`` (names without extension) and for each name a class and an
object mask. CVAT finds the frame of a task by the end of its path, and refuses a zip with a name that the task does not have.
Pixels without a class are black in both masks: no object, so no annotation. Each class of an image is one object.
"""

from __future__ import annotations

import zipfile

import numpy as np

from raysal.archive.uris import join, write_stream
from raysal.errors import InputError
from raysal.export.job import Job, Labelled, parts
from raysal.export.png import palette_png
from raysal.labels import LabelSet

IMAGES_PER_ZIP = 10_000
"""A zip's table of contents is held until its end, so it must not grow with the archive; CVAT's tasks are smaller anyway."""


def write(job: Job) -> None:
    """Writes ``cvat-0000.zip``, ``cvat-0001.zip``, ...

    Raises:
        InputError: A class has a name that a label map can't hold.
    """
    label_map, class_palette, object_palette = _label_map(job.label_set), _class_palette(job.label_set), voc_palette()

    def masks(image: Labelled) -> tuple[bytes, bytes]:
        index_HW = image.mask_HW + np.uint8(1)  # 255, no class, wraps to 0, the background
        return palette_png(index_HW, class_palette), palette_png(index_HW, object_palette)

    with job.name_table() as note:
        for number, group in parts(job.each(masks), lambda _: 1, IMAGES_PER_ZIP):
            file, names = f"cvat-{number:04d}.zip", list[str]()
            with write_stream(join(job.out, file)) as stream, zipfile.ZipFile(stream, "w") as archive:  # type: ignore[arg-type]
                _put(archive, "labelmap.txt", label_map.encode())
                for image, (class_png, object_png) in group:
                    _put(archive, f"SegmentationClass/{image.name}.png", class_png)
                    _put(archive, f"SegmentationObject/{image.name}.png", object_png)
                    names.append(image.name)
                    note(image, file)
                _put(archive, "ImageSets/Segmentation/default.txt", "".join(f"{name}\n" for name in names).encode())
            job.files.append(file)


def voc_palette() -> np.ndarray:
    """Pascal VOC's colours: uint8 [256, 3]. A number's bits, from the lowest, fill red, green and blue in turn, from their highest."""
    numbers, palette = np.arange(256), np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def _class_palette(label_set: LabelSet) -> np.ndarray:
    """Background, then the classes in their colours; a colour that is black or taken already gives way to a free one."""
    taken, free = [(0, 0, 0)], [tuple(int(n) for n in rgb) for rgb in voc_palette()]
    for rgb in label_set.colors:
        spare = (f for f in free if f not in taken and f not in label_set.colors)
        taken.append(rgb if rgb not in taken else next(spare))  # type: ignore[arg-type]
    return np.array(taken, dtype=np.uint8)


def _label_map(label_set: LabelSet) -> str:
    """``labelmap.txt``: ``name:r,g,b:parts:actions`` a line, the background first."""
    for name in label_set.classes:
        if ":" in name or name.startswith("#") or name != name.strip() or len(name.splitlines()) != 1:
            raise InputError(
                f"class {name!r}: CVAT's label map has no name with a colon, a leading '#', blanks around it or several lines; "
                "give a label set with another name for it with --classes"
            )
    background = next(name for name in ("background", "no class", "none of the classes") if name not in label_set.classes)
    lines = zip((background, *label_set.classes), _class_palette(label_set).tolist(), strict=True)
    return "# label:color_rgb:parts:actions\n" + "".join(f"{name}:{r},{g},{b}::\n" for name, (r, g, b) in lines)


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """A file of a fixed date, so that equal labels give equal zips; not deflated, since PNGs are."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)
