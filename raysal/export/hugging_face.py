"""Hugging Face: Parquet shards that ``datasets.load_dataset`` opens with images, masks and class names.

The mask is an image of class ids, 255 = no class. ``classes`` lists the classes that it shows as `ClassLabel`, which carries all
names: ``dataset.features["classes"].feature.names[id]``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raysal.archive.fetch import fetch_image, fetch_label
from raysal.archive.uris import join, write_bytes, write_stream
from raysal.errors import ImageError
from raysal.export.job import Job, Labelled, parts
from raysal.images.decode import decode_image, open_image
from raysal.labels import LabelSet

SHARD_BYTES = 500 * 10**6
"""Size at which the next shard begins, as on the Hub."""

GROUP_BYTES, GROUP_ROWS = 16 * 10**6, 100
"""Size and rows of a row group: what a reader, and this writer, holds at a time."""

RAW_BYTES = 32
"""Of a pixel, at most: four bands of double precision."""

EXIF_ORIENTATION = 0x0112

Row = dict[str, Any]


def write(job: Job) -> None:
    """Writes ``data/train-00000.parquet``, ... and a dataset card. With images, one that changed since it was labelled is left out."""
    schema = schema_of(job.label_set, job.with_images)
    write_bytes(join(job.out, "README.md"), _card(job.label_set).encode())
    rows = (row for _, row in job.each(lambda image: _row(job, image)))
    for number, shard in parts(rows, _size, SHARD_BYTES):
        file = f"data/train-{number:05d}.parquet"
        with write_stream(join(job.out, file)) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
            for group in _groups(shard):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        job.files.append(file)


def schema_of(label_set: LabelSet, with_images: bool) -> pa.Schema:
    """Columns of a shard; the metadata tells `datasets` what they are."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    names = {"names": list(label_set.classes), "_type": "ClassLabel"}
    columns: list[tuple[str, pa.DataType, Row]] = [
        ("id", pa.string(), _value("string")),
        ("uri", pa.string(), _value("string")),
        *([("image", image, {"_type": "Image"})] if with_images else []),
        ("mask", image, {"_type": "Image"}),
        ("classes", pa.list_(pa.int64()), {"feature": names, "_type": "Sequence"}),  # newer versions say List, and read Sequence too
        ("class_fractions", pa.list_(pa.float32()), {"feature": _value("float32"), "_type": "Sequence"}),
        ("confidence", pa.float32(), _value("float32")),
        ("abstained", pa.float32(), _value("float32")),
        ("width", pa.int32(), _value("int32")),
        ("height", pa.int32(), _value("int32")),
        ("source_sha256", pa.string(), _value("string")),
        ("model_digest", pa.string(), _value("string")),
    ]
    features = {name: feature for name, _, feature in columns}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([(name, kind) for name, kind, _ in columns], metadata=metadata)


def image_file(data: bytes, max_pixels: int, uri: str) -> bytes:
    """An image file that `datasets` shows as the masks see it.

    JPEG, PNG and TIFF stay as they are. What it can't open, or would turn (it applies EXIF orientation, masks do not), becomes PNG.

    Raises:
        ImageError: As `raysal.images.decode.decode_image`.
    """
    try:
        with open_image(io.BytesIO(data), max_pixels, uri) as image:
            if image.getexif().get(EXIF_ORIENTATION, 1) == 1:
                return data
    except ImageError as error:
        if error.status == "limit":
            raise
    file = io.BytesIO()
    Image.fromarray(decode_image(data, max_pixels, uri, partial(fetch_label, uri))).save(file, "PNG")
    return file.getvalue()


def _row(job: Job, image: Labelled) -> Row:
    kept = ("id", "uri", "class_fractions", "confidence", "abstained", "width", "height", "source_sha256", "model_digest")
    row = {k: image.row[k] for k in kept} | {"classes": image.classes, "mask": {"bytes": image.row["mask_png"], "path": f"{image.id}.png"}}
    if row["class_fractions"] is None:
        row["class_fractions"] = (image.pixels_C / max(1, int(image.pixels_C.sum()))).astype(np.float32).tolist()
    return row | {"image": _image(job, image)} if job.with_images else row


def _image(job: Job, image: Labelled) -> Row:
    pixels = image.mask_HW.size  # it was labelled, whatever the limits were then
    data = fetch_image(image.uri, job.max_bytes + RAW_BYTES * pixels)
    known = image.row["source_sha256"]
    if known is not None and hashlib.sha256(data).hexdigest() != known:
        raise ImageError("changed", f"{image.uri}: the file is not the one that was labelled; label it again")
    kept = image_file(data, pixels, image.uri)
    return {"bytes": kept, "path": image.id + (_extension(image.uri) if kept is data else ".png")}


def _extension(uri: str) -> str:
    tail = uri.rpartition(".")[2]
    return f".{tail.lower()}" if tail.isalnum() and len(tail) <= 5 else ""


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows in lists for one row group each."""
    share = GROUP_BYTES // GROUP_ROWS
    return (list(group) for _, group in parts(rows, lambda row: max(share, _size(row)), GROUP_BYTES))


def _size(row: Row) -> int:
    return len(row["mask"]["bytes"]) + (len(row["image"]["bytes"]) if "image" in row else 0)


def _value(dtype: str) -> Row:
    return {"dtype": dtype, "_type": "Value"}


def _card(label_set: LabelSet) -> str:
    """README.md. It names no ``configs``: with them `datasets` takes folders of one name for one data set, and answers from its cache."""
    names = "\n".join(f"| {c} | {name} |" for c, name in enumerate(label_set.classes))
    return (
        "---\ntask_categories:\n- image-segmentation\n---\n\n"
        f"# Masks of rover images, label set {label_set.name}\n\n"
        "`mask` holds class ids, 255 = no class. Made by a model (`model_digest`), not drawn by people.\n\n"
        f"| id | class |\n|---|---|\n{names}\n"
    )
