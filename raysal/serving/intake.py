"""From a request to images: bytes, several files in one form, or a URI under a root that the operator opened."""

import contextlib
import hashlib
import io
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from raysal.archive.fetch import fetch_image, fetch_label
from raysal.archive.uris import canonical, is_local
from raysal.errors import ImageError, InputError
from raysal.images import products
from raysal.images.decode import FORMATS, SIGNATURES, decode
from raysal.images.parts import check_parts
from raysal.serving.problems import Problem
from raysal.serving.settings import Limits

STORES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "az", "memory")
"""Kinds of stores that a root may lie in. Web servers are none: they redirect wherever they like."""

FETCH_S = 20.0
LABELS = (".xml", ".lbl")


@dataclass(frozen=True)
class Upload:
    """An encoded image.

    Attributes:
        name: What the client calls it.
        data: The file.
        label: The detached label that came with it, for archive products.
    """

    name: str
    data: bytes
    label: bytes | None = None


@dataclass(frozen=True)
class Picture:
    """A decoded image; see `raysal.answers.Seen`."""

    id: str
    name: str
    image_HWC: np.ndarray
    valid_HW: np.ndarray

    @property
    def pixels(self) -> int:
        return int(self.valid_HW.size)


def paired(files: Sequence[tuple[str, bytes]]) -> list[Upload]:
    """Files of a form as images; a detached label goes with the data of its name.

    Raises:
        Problem: 400 where there is no image.
    """
    labels = {_stem(name): data for name, data in files if name.lower().endswith(LABELS)}
    found = [Upload(name, data, labels.get(_stem(name))) for name, data in files if not name.lower().endswith(LABELS)]
    if not found:
        raise Problem(400, "the form holds no image; add files to it, for example: curl -F image=@scene.png", "form")
    return found


def read(upload: Upload, limits: Limits, black_border: bool) -> Picture:
    """Decodes an image.

    Raises:
        Problem: 400, 413, 415 or 422; each says what to do.
    """
    data, name = upload.data, upload.name
    if not data:
        raise Problem(400, f"{name}: the body is empty; send an image: curl --data-binary @scene.png", "empty")
    if not data.startswith(SIGNATURES) and upload.label is None and not products.attached(data):
        raise Problem(
            415,
            f"{name}: neither JPEG, PNG, TIFF, VICAR nor PDS3 with its label attached, whatever its name or type say; convert it, "
            "or send a product's data and label as two files of one form",
            "type",
        )
    try:
        found = decode(data, limits.max_pixels, name, lambda: upload.label, limits.max_bands, black_border)
    except ImageError as error:
        if error.status == "limit":
            raise Problem(413, _clean(error), "pixels") from error
        raise Problem(422, _clean(error), "damaged") from error
    digest = hashlib.sha256(data).hexdigest()
    return Picture(digest, name, found.image_HWC, found.valid_HW)


def look(upload: Upload, most: int) -> int:
    """About how many pixels an image will take, at most `most`: from the header of a picture, else from the bytes.

    Raises:
        Problem: 422 where it holds several frames; of a JPEG with pictures of its own (MPO) the first counts.
    """
    pixels, several = len(upload.data), False  # of what is no picture; what it is will be said when it is read
    with contextlib.suppress(Exception):
        check_parts(upload.data, upload.name)
        with Image.open(io.BytesIO(upload.data), formats=FORMATS) as image:
            pixels = image.width * image.height
            several = image.format != "MPO" and getattr(image, "is_animated", False)  # frames are not counted: that is a walk over all
    if several:
        raise Problem(422, f"{upload.name}: holds several frames; send one of them as an image of its own", "frames")
    return min(most, max(1, pixels))


def fetch(uri: str, roots: Sequence[str], limits: Limits) -> Upload:
    """The bytes that a URI names, if it lies under one of the roots.

    Raises:
        Problem: 413 where it is too large; 422 where it can't be had. What is outside and what is not there look the same.
    """
    try:
        place = allowed(uri, roots)
        data = fetch_image(place, limits.max_bytes, FETCH_S)
        beside = None
        if not data.startswith(SIGNATURES) and not products.attached(data):
            beside = fetch_label(place, max_seconds=FETCH_S, allowed=lambda label: allowed(label, roots))
    except InputError as error:
        raise Problem(422, str(error), "uri") from error
    except ImageError as error:
        if error.status == "limit":
            raise Problem(413, f"the image is larger than {limits.max_bytes} bytes; cut it into tiles", "bytes") from error
        raise Problem(422, "the image that uri names can't be had; check the name, or send its bytes", "uri") from error
    return Upload(posixpath.basename(place), data, beside)


def allowed(uri: str, roots: Sequence[str]) -> str:
    """The one spelling of a URI under a root.

    Links are followed before the answer, so that none leads out.

    Raises:
        InputError: It lies under no root.
    """
    refusal = InputError(
        "uri: no image under the places that this endpoint reads; "
        + ("ask the operator which they are, or send the image's bytes" if roots else "it reads none: send the image's bytes")
    )
    if "::" in uri or "\x00" in uri or len(uri) > 4096 or ".." in uri.replace("\\", "/").split("/"):
        raise refusal
    try:
        place = _real(uri)
        for root in roots:
            if place.startswith(_real(root).rstrip("/") + "/"):
                return place
    except (InputError, OSError, ValueError):
        pass
    raise refusal


def check_roots(roots: Sequence[str]) -> None:
    """Refuses roots in stores that can't be kept to. Raises InputError."""
    for root in roots:
        scheme = root.partition("://")[0].lower() if "://" in root else "file"
        if "::" in root or scheme not in STORES:
            raise InputError(f"roots: {root!r} is in no store that can be kept to (a web server may redirect); valid: {', '.join(STORES)}")


def _real(uri: str) -> str:
    place = canonical(uri)
    return os.path.realpath(place) if is_local(place) else place


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name.replace("\\", "/")))[0].lower()


def _clean(error: ImageError) -> str:
    return (
        str(error)
        .replace("raise data.max_pixels if such images are wanted, or cut", "cut")
        .replace("raise data.max_bands", "send fewer bands")
    )
