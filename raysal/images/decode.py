"""From the bytes of one image file to RGB pixels, with the limits checked before anything is decoded."""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from raysal.errors import ImageError

FORMATS = tuple(p.format for p in (JpegImagePlugin.JpegImageFile, PngImagePlugin.PngImageFile, TiffImagePlugin.TiffImageFile))
"""Every other format that pillow knows stays closed: fewer parsers stand between hostile bytes and the machine."""


def decode_image(data: bytes, max_pixels: int, name: str) -> np.ndarray:
    """Decodes a JPEG, PNG or TIFF file to RGB.

    Grey becomes three equal channels, palettes their colours, CMYK and YCbCr RGB; alpha is dropped, not blended; of several
    frames the first is taken. 16-bit grey is scaled by one fixed rule, ``round(value / 257)``, so that 65535 becomes 255 and
    equal brightness stays equal over images (12-bit values in 16-bit files come out dark: scale those before).

    EXIF orientation is not applied: masks, exclude masks and archive coordinates all refer to the raster as stored, and a
    turned image would part from them.

    Args:
        data: The whole file.
        max_pixels: Largest height x width to accept, checked on the header before decoding.
        name: What error messages call the file, usually its URI.

    Returns:
        uint8 [H, W, 3] RGB, C-contiguous and writable.

    Raises:
        ImageError: status ``limit`` where the image is too large, ``decode`` where the bytes are damaged or no image.
    """
    try:
        with open_image(io.BytesIO(data), max_pixels, name) as image:
            return np.ascontiguousarray(_rgb(image, name))
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("limit", f"{name}: not enough memory to decode it; lower data.max_pixels") from error
    except Exception as error:  # each pillow plugin raises its own types on damaged bytes; every one means the same to us
        raise ImageError("decode", f"{name}: damaged image ({_one_line(error)}); fetch or export the file again") from error


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


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [H, W, 3] by the rules that `decode_image` states."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):  # older pillow gives 16-bit PNGs mode I
        image_HW = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(image_HW.astype(np.uint8)[:, :, None], 3, axis=2)
    if mode in ("I", "F"):
        raise ImageError(
            "decode",
            f"{name}: 32-bit or signed samples (pillow mode {mode}) have no fixed brightness range; save it as 8-bit or unsigned 16-bit",
        )
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
