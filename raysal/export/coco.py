"""COCO: one JSON file, each class of an image one annotation with compressed RLE, as COCO's stuff segmentation has them.

``iscrowd`` is 0: tools pass over crowds in training and ignore them in evaluation. Category ids are class id + 1, as 0 means
background to many tools. Pixels without a class are in no annotation.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import raysal
from raysal.archive.uris import join, write_errors, write_stream
from raysal.export.job import Job, Labelled
from raysal.images.rle import coco_rle

FILE = "annotations.json"
SPOOL_BYTES = 16 * 2**20
"""Image entries held in memory; more go to a temporary file."""


def write(job: Job) -> None:
    """Writes the annotations as they come, then the image entries, which were kept aside in a temporary file."""
    annotation_id = 0
    with write_stream(join(job.out, FILE)) as file, job.name_table() as note, tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        file.write(f'{{"info": {_json(_info(job))},\n"categories": {_json(_categories(job))},\n"annotations": ['.encode())
        for number, (image, found) in enumerate(job.each(_annotations), 1):
            for annotation in found:
                annotation_id += 1
                line = {"id": annotation_id, "image_id": number, **annotation}
                file.write(f"{',' * (annotation_id > 1)}\n{_json(line)}".encode())
            with write_errors("temporary files"):
                spool.write(f"{',' * (number > 1)}\n{_json(_image(number, image))}".encode())
            note(image, FILE)
        file.write(b'\n],\n"images": [')
        spool.seek(0)
        while piece := spool.read(2**20):
            file.write(piece)
        file.write(b"\n]}\n")
    job.files.append(FILE)


def _annotations(image: Labelled) -> list[dict[str, Any]]:
    return [{"category_id": c + 1, "iscrowd": 0, **coco_rle(image.mask_HW == c)} for c in image.classes]


def _image(number: int, image: Labelled) -> dict[str, Any]:
    height, width = image.mask_HW.shape
    kept = ("confidence", "abstained", "model_digest")
    return {
        "id": number,
        "file_name": image.name,
        "width": width,
        "height": height,
        "raysal": {"id": image.id, "uri": image.uri, **{k: image.row[k] for k in kept}},
    }


def _categories(job: Job) -> list[dict[str, Any]]:
    classes = zip(job.label_set.classes, job.label_set.colors, strict=True)
    return [{"id": c + 1, "name": name, "supercategory": job.label_set.name, "color": list(rgb)} for c, (name, rgb) in enumerate(classes)]


def _info(job: Job) -> dict[str, Any]:
    return {"description": f"masks by raysal, label set {job.label_set.name}", "version": raysal.__version__}


def _json(value: Any) -> str:
    return json.dumps(value)
