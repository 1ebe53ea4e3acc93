"""From the bytes of one image file to RGB pixels, with the limits checked before anything is decoded."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from scipy import ndimage

from raysal.errors import ImageError, ResourceError
from raysal.images import products
from raysal.images.parts import check_parts

FORMATS = tuple(p.format for p in (JpegImagePlugin.JpegImageFile, PngImagePlugin.PngImageFile, TiffImagePlugin.TiffImageFile))
"""Every other format that pillow knows stays closed: fewer parsers stand between hostile bytes and the machine."""

SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"MM\x00*")
"""How JPEG, PNG and TIFF files begin: no label beside them is asked for."""

Image.MAX_IMAGE_PIXELS = None  # pillow's own limit comes before ours, which every image meets before it is decoded, and can't be raised

MAX_BANDS = 4
"""Of a product, where nobody says otherwise."""

PERCENTILES = (0.5, 99.5)

MIN_BORDER = 0.01
"""Share of an image that a black border takes at least."""

Label = Callable[[], bytes | None] | None


@dataclass(frozen=True)
class Decoded:
    """An image ready for the network.

    Attributes:
        image_HWC: uint8 [H, W, 3] RGB, C-contiguous and writable.
        valid_HW: bool [H, W]; False where there is no data: codes of the product's label, transparent pixels, black borders.
    """

    image_HWC: np.ndarray
    valid_HW: np.ndarray


def decode_image(data: bytes, max_pixels: int, name: str, label: Label = None, max_bands: int = MAX_BANDS) -> np.ndarray:
    """The pixels of `decode`, for who does not ask where there is no data."""
    return decode(data, max_pixels, name, label, max_bands, borders=False).image_HWC


def decode(data: bytes, max_pixels: int, name: str, label: Label = None, max_bands: int = MAX_BANDS, borders: bool = True) -> Decoded:
    """Decodes a JPEG, PNG, TIFF, PDS3, PDS4 or VICAR file to RGB.

    Grey becomes three equal channels, palettes their colours, CMYK and YCbCr RGB; of several frames the first is taken, of more than three
    bands the first three. Samples of more than 8 bits are stretched to 8 (`stretch`). Alpha is dropped, not blended; where it is zero
    there is no data.

    EXIF orientation and a PDS4 label's display direction are not applied: masks, exclude masks and archive coordinates all refer to the
    raster as stored, and a turned image would part from them.

    Args:
        data: The whole file.
        max_pixels: Largest height x width to accept, checked on the header before decoding.
        name: What error messages call the file, usually its URI.
        label: Fetches the label beside the file; called only where the file is no image by itself.
        max_bands: Most bands of a product to accept.
        borders: Whether black borders count as no data (`black_border`).

    Raises:
        ImageError: status ``limit`` where the image is too large, ``decode`` where the bytes are damaged or no image; or what `label`
            raises.
    """
    try:
        check_parts(data, name)
        if products.attached(data):
            return _product(products.read_product(data, None, max_pixels, max_bands, name), borders)
        if label is not None and not data.startswith(SIGNATURES) and (beside := label()) is not None:
            return _product(products.read_product(data, beside, max_pixels, max_bands, name), borders)
        with open_image(io.BytesIO(data), max_pixels, name) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                return _product(_deep(image), borders)
            image_HWC = np.ascontiguousarray(_rgb(image))
            if 0 < image_HWC.max() < 16 and bit_depth(image, data) == 16:  # pillow gives the upper byte of each
                raise ImageError("decode", f"{name}: colour of 12 bits in samples of 16 can't be read; save it with 8 bits, or in grey")
            valid_HW = ~black_border(image_HWC) if borders else np.ones(image_HWC.shape[:2], bool)
            if image.has_transparency_data:
                alpha = image if "A" in image.getbands() else image.convert("RGBA")
                valid_HW &= np.asarray(alpha.getchannel("A")) > 0
            return Decoded(image_HWC, valid_HW)
    except (ImageError, ResourceError):
        raise
    except MemoryError as error:
        raise ImageError("limit", f"{name}: not enough memory to decode it; lower data.max_pixels") from error
    except Exception as error:  # each library raises its own types on damaged bytes; every one means the same to us
        raise ImageError("decode", f"{name}: damaged image ({_one_line(error)}); fetch or export the file again") from error


def stretch(values_HWB: np.ndarray, valid_HW: np.ndarray) -> np.ndarray:
    """Samples of more than 8 bits to the 8 that networks are trained on: linear, from the 0.5th to the 99.5th percentile of what is valid.

    Bands are stretched together, so that colours stay. Percentiles of each image, as its 12-bit counts, radiances or reflectances have no
    common scale, and exposures differ; so brightness compares within an image only.

    Args:
        values_HWB: Any integer or real type.
        valid_HW: bool [H, W].

    Returns:
        uint8 [H, W, B]; 0 where not valid, and 127 everywhere where an image has one value.
    """
    measured = values_HWB[valid_HW]
    if not measured.size:
        return np.zeros(values_HWB.shape, np.uint8)
    low, high = np.percentile(measured, PERCENTILES).astype(np.float64)
    del measured
    stretched_HWB = np.zeros(values_HWB.shape, np.uint8)
    for band in range(values_HWB.shape[2]):  # one at a time: a large product's bands as real numbers are many times its size
        with np.errstate(invalid="ignore", over="ignore"):
            share_HW = values_HWB[:, :, band].astype(np.float32)
            share_HW = (share_HW - low) / (high - low) if high > low else np.full_like(share_HW, 0.5)
        level_HW = (np.nan_to_num(share_HW, copy=False).clip(0, 1, out=share_HW) * 255).astype(np.uint8)
        stretched_HWB[:, :, band][valid_HW] = level_HW[valid_HW]
    return stretched_HWB


def black_border(image_HWC: np.ndarray) -> np.ndarray:
    """bool [H, W]: where mosaics and warped frames are filled up with black.

    Pixels that are 0 in every channel and hang together with the image's edge, where they are at least a hundredth of it: a shadow
    at the edge is rarely that black and that large.
    """
    black_HW: np.ndarray = np.logical_not(image_HWC.any(axis=2))
    edges = (black_HW[0], black_HW[-1], black_HW[:, 0], black_HW[:, -1])
    if black_HW.sum() < MIN_BORDER * black_HW.size or not any(edge.any() for edge in edges):
        return np.zeros_like(black_HW)
    area_HW, n = ndimage.label(black_HW)
    sizes = np.bincount(area_HW.ravel(), minlength=n + 1)
    touching = np.unique(np.concatenate([area_HW[0], area_HW[-1], area_HW[:, 0], area_HW[:, -1]]))
    filled = [area for area in touching if area and sizes[area] >= MIN_BORDER * black_HW.size]
    return np.isin(area_HW, filled)


def _product(samples: products.Samples, borders: bool) -> Decoded:
    values_HWB, valid_HW = samples.values_HWB, samples.valid_HW
    if borders:
        valid_HW = valid_HW & ~black_border(values_HWB)
    if values_HWB.dtype != np.uint8:
        values_HWB = stretch(values_HWB, valid_HW)
    image_HWC = np.repeat(values_HWB, 3, axis=2) if values_HWB.shape[2] == 1 else values_HWB.copy()
    return Decoded(np.ascontiguousarray(image_HWC), valid_HW)


def image_size(file: BinaryIO, max_pixels: int, name: str) -> tuple[int, int]:
    """Height and width in pixels from the header alone. Raises ImageError as `decode_image` does."""
    with open_image(file, max_pixels, name, verify=False) as image:
        return image.height, image.width


def open_image(file: BinaryIO, max_pixels: int, name: str, formats: tuple[str, ...] = FORMATS, verify: bool = True) -> Image.Image:
    """Opens a file with its header checked; pixels are read by the caller.

    Args:
        file: Seekable, at its start.
        max_pixels: Largest height x width to accept.
        name: What error messages call the file.
        formats: Pillow's names of the formats to accept.
        verify: Also checks every checksum of a PNG, which pillow's decoder skips.

    Raises:
        ImageError: ``limit`` or ``decode``.
    """
    head = file.read(32)
    file.seek(0)
    if not head:
        raise ImageError("decode", f"{name}: the file is empty; fetch or export it again")
    try:
        image = Image.open(file, formats=formats)
        _check_size(image, max_pixels, name)
        if verify and image.format == "PNG":
            image.verify()  # leaves the image unusable, so it is opened once more
            file.seek(0)
            image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("limit", f"{name}: {_one_line(error)}; cut it into tiles") from error
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            "decode", f"{name}: not a {', '.join(formats[:-1])} or {formats[-1]} image (it starts with {head[:16]!r}); convert it first"
        ) from error
    except Exception as error:  # as in decode_image
        raise ImageError("decode", f"{name}: damaged image ({_one_line(error)}); fetch or export the file again") from error
    return image


def bit_depth(image: Image.Image, data: bytes) -> int:
    """Bits of one sample as stored in the file, which pillow's modes hide."""
    if image.format == "PNG":
        return data[24]  # the header chunk always comes first: 8 signature, 8 chunk head, 4 width, 4 height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))))
    return 8


def _check_size(image: Image.Image, max_pixels: int, name: str) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(
            "limit",
            f"{name}: {image.width} x {image.height} is more than {max_pixels} pixels; "
            "raise data.max_pixels if such images are wanted, or cut it into tiles",
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # a tile is decoded whole, however little of it lies in the image
        width, height = (image.tag_v2.get(tag) or 0 for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        if width * height > max_pixels:
            raise ImageError("limit", f"{name}: tiles of {width} x {height} are more than {max_pixels} pixels; save it with smaller ones")


def _deep(image: Image.Image) -> products.Samples:
    """A grey picture of more than 8 bits, by the rules for products."""
    values_HW = np.asarray(image)
    valid_HW = products.measured(values_HW)
    if isinstance(code := image.info.get("transparency"), int):
        valid_HW &= values_HW != code
    return products.Samples(values_HW[:, :, None], valid_HW)


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] by the rules that `decode_image` states."""
    mode = image.mode
    if mode in ("RGB", "RGBA", "RGBX"):
        return np.array(image)[:, :, :3]
    if mode in ("L", "LA"):
        image_HW = np.array(image.getchannel("L"))
        return np.repeat(image_HW[:, :, None], 3, axis=2)
    if mode in ("RGBa", "La"):  # colours stored multiplied by alpha
        image = image.convert("RGBA" if mode == "RGBa" else "LA")
    return np.array(image.convert("RGB"))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
