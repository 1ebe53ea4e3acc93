"""Label masks as files: one value a pixel, kept to the bit."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from raysal.errors import ImageError
from raysal.images.decode import bit_depth, open_image
from raysal.images.parts import check_parts

LOSSLESS = ("PNG", "TIFF")


def decode_mask(data: bytes, max_pixels: int, name: str) -> np.ndarray:
    """The values that a mask file stores, before any label set gives them a meaning.

    Palette files give their indices, 1-, 2- and 4-bit grey files the stored small numbers (pillow would stretch them to 255),
    RGB files with equal channels one of them, 16-bit files their values where all are under 256; alpha is dropped.

    Args:
        data: The whole file, PNG or TIFF; JPEG is refused because it changes values.
        max_pixels: Largest height x width to accept, checked on the header before decoding.
        name: What error messages call the file, usually its URI.

    Returns:
        uint8 [H, W] file values, C-contiguous and writable.

    Raises:
        ImageError: status ``limit`` where the mask is too large; ``decode`` where it is damaged, lossy, in colours, or holds values
            over 255.
    """
    if data[:3] == b"\xff\xd8\xff":
        raise ImageError("decode", f"{name}: a JPEG mask has blurred values; save masks as one-channel PNG")
    try:
        check_parts(data, name)
        with open_image(io.BytesIO(data), max_pixels, name, LOSSLESS) as image:
            return _values(image, bit_depth(image, data), name)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("limit", f"{name}: not enough memory to decode it; lower data.max_pixels") from error
    except Exception as error:  # each pillow plugin raises its own types on damaged bytes; every one means the same to us
        message = " ".join(str(error).split())[:200]
        raise ImageError("decode", f"{name}: damaged mask ({type(error).__name__}: {message}); restore the file") from error


def encode_mask(mask_HW: np.ndarray) -> bytes:
    """A lossless one-channel 8-bit PNG; equal masks give equal bytes.

    Args:
        mask_HW: uint8 [H, W].

    Raises:
        ValueError: Another type or shape.
    """
    if mask_HW.dtype != np.uint8 or mask_HW.ndim != 2 or not mask_HW.size:
        raise ValueError(f"a mask must be uint8 [H, W], got {mask_HW.dtype} {mask_HW.shape}")
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask_HW)).save(file, "PNG")
    return file.getvalue()


def _values(image: Image.Image, bits: int, name: str) -> np.ndarray:
    """uint8 [H, W] by the rules that `decode_mask` states."""
    mode = image.mode
    if mode == "1":
        return np.array(image).astype(np.uint8)
    if mode == "P":
        return np.array(image)
    if mode == "L":
        values_HW = np.array(image)
        return values_HW // (255 // (2**bits - 1)) if bits < 8 else values_HW
    if mode == "LA" and bits <= 8:
        return np.array(image.getchannel("L"))
    if mode == "I" or mode.startswith("I;16"):
        wide_HW = np.asarray(image)
        if wide_HW.min() < 0 or wide_HW.max() > 255:
            raise ImageError(
                "decode",
                f"{name}: mask values from {wide_HW.min()} to {wide_HW.max()}; class values must be 0 to 255, save it as 8-bit PNG",
            )
        return wide_HW.astype(np.uint8)
    if mode in ("RGB", "RGBA") and bits <= 8:
        rgb_HWC = np.asarray(image)
        if (rgb_HWC[:, :, 0] == rgb_HWC[:, :, 1]).all() and (rgb_HWC[:, :, 0] == rgb_HWC[:, :, 2]).all():
            return np.ascontiguousarray(rgb_HWC[:, :, 0])
        raise ImageError("decode", f"{name}: a mask in colours; save one class value a pixel as one-channel PNG")
    raise ImageError("decode", f"{name}: a {bits}-bit {mode} mask; save one class value a pixel as one-channel 8-bit PNG")
