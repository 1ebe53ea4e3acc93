"""Label Studio: tasks with predictions to import, and the labeling configuration that belongs to them.

Each class of an image is one brush region; pixels without a class are in none. ``model_version`` is the checkpoint's digest,
``score`` the mask's mean confidence, so that tasks can be sorted by it.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from raysal.archive.uris import join, write_bytes, write_stream
from raysal.errors import InputError
from raysal.export.job import Job, Labelled, parts
from raysal.images.rle import brush_rle
from raysal.labels import LabelSet

TASKS_BYTES = 100 * 10**6
"""Size at which the next file begins; Label Studio takes uploads of up to 250 MB unless told otherwise."""

BRUSH, IMAGE = "classes", "image"
"""Names of the two tags in the labeling configuration."""


def write(job: Job) -> None:
    """Writes ``tasks-0000.json``, ``tasks-0001.json``, ... and ``label-config.xml``."""
    write_bytes(join(job.out, "label-config.xml"), label_config(job.label_set).encode())
    job.files.append("label-config.xml")
    local = False
    for number, group in parts(job.each(lambda image: _task(job, image)), lambda found: len(found[1]), TASKS_BYTES):
        file = f"tasks-{number:04d}.json"
        with write_stream(join(job.out, file)) as stream:
            for i, (image, task) in enumerate(group):
                stream.write((b",\n" if i else b"[\n") + task)
                local = local or (job.image_root is None and _is_path(image.uri))
            stream.write(b"\n]\n")
        job.files.append(file)
    if local:
        job.warnings.append(
            "Label Studio can't open paths of this machine; say with --image-root where it finds the images, "
            "for example --image-root '/data/local-files/?d=mars'"
        )


def label_config(label_set: LabelSet) -> str:
    """The labeling configuration: an image with one brush a class."""
    labels = "\n".join(
        f'    <Label value={quoteattr(name)} background="#{r:02x}{g:02x}{b:02x}"/>'
        for name, (r, g, b) in zip(label_set.classes, label_set.colors, strict=True)
    )
    return (
        f'<View>\n  <Image name="{IMAGE}" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="{BRUSH}" toName="{IMAGE}">\n{labels}\n  </BrushLabels>\n</View>\n'
    )


def image_address(root: str, below: list[str]) -> str:
    """Where Label Studio finds an image: a root, and the image's path below the folder that all images share.

    Web addresses, and paths on Label Studio's own server, are percent-encoded; names in object stores are taken as they are.
    """
    path = "/".join(below)
    if root.startswith(("http://", "https://", "/")):
        path = quote(path)
    return root + ("" if root.endswith(("/", "=")) else "/") + path


def _task(job: Job, image: Labelled) -> bytes:
    address = image.uri if job.image_root is None else image_address(job.image_root, job.names.below_root(image.uri))
    prediction: dict[str, Any] = {
        "model_version": image.row["model_digest"] or "raysal",
        "result": [_region(job.label_set, image, c) for c in image.classes],
    }
    if image.row["confidence"] is not None:
        prediction["score"] = image.row["confidence"]
    return json.dumps(
        {"data": {"image": address, "id": image.id, "uri": image.uri}, "predictions": [prediction]}, separators=(",", ":")
    ).encode()


def _region(label_set: LabelSet, image: Labelled, class_: int) -> dict[str, Any]:
    height, width = image.mask_HW.shape
    if height * width >= 2**30:
        raise InputError(f"{image.uri}: {width} x {height} pixels are more than Label Studio's masks can count; cut it into tiles")
    return {
        "id": f"{image.id[:12]}-{class_}",
        "type": "brushlabels",
        "from_name": BRUSH,
        "to_name": IMAGE,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": list(brush_rle(image.mask_HW == class_)), "brushlabels": [label_set.classes[class_]]},
    }


def _is_path(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", "local://"))
