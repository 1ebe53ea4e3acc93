"""Run-length codes of one class of a mask, as annotation tools define them."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco

BRUSH_SIZES = (3, 4, 8, 16)
"""Widths in bits of a run's length that `brush_rle` announces and uses; the shortest that fits is taken."""


def coco_rle(inside_HW: np.ndarray) -> dict:
    """COCO's compressed RLE, its area and its box, by COCO's own library.

    Args:
        inside_HW: bool [H, W].

    Returns:
        ``{"segmentation": {"size": [H, W], "counts": text}, "area": pixels, "bbox": [x, y, width, height]}``, ready for JSON.
    """
    rle = coco.encode(np.asfortranarray(inside_HW, dtype=np.uint8))
    return {
        "segmentation": {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")},
        "area": int(coco.area(rle)),
        "bbox": [float(n) for n in coco.toBbox(rle)],
    }


def brush_rle(inside_HW: np.ndarray) -> bytes:
    """Label Studio's brush RLE: the bit stream of thi.ng/rle-pack over an RGBA image that is 255 inside and 0 outside.

    The stream: number of values (32 bits), bits of a value - 1 (5), the four widths of lengths - 1 (4 each); then for each run
    one bit 1, which width (2), length - 1 (that width), the value (8). A pixel is four equal values, so runs never hold fewer.

    Args:
        inside_HW: bool [H, W], fewer than 2**30 pixels.
    """
    flat = inside_HW.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = 4 * np.diff(np.append(starts, flat.size))
    longest = 2 ** BRUSH_SIZES[-1]
    pieces = -(-lengths // longest)  # a run longer than the widest length can say is written in several
    values = np.repeat(np.where(flat[starts], 255, 0), pieces)
    sizes = np.full(values.size, longest)
    sizes[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * longest

    which = np.searchsorted([2**bits for bits in BRUSH_SIZES], sizes)
    widths = np.array(BRUSH_SIZES)[which]
    codes = (1 << (widths + 10)) | (which << (widths + 8)) | ((sizes - 1) << 8) | values
    total = widths + 11
    bits = np.unpackbits((codes << (32 - total)).astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    head = f"{4 * flat.size:032b}{8 - 1:05b}" + "".join(f"{bits - 1:04b}" for bits in BRUSH_SIZES)
    body = bits[np.arange(32) < total[:, None]]
    return np.packbits(np.concatenate([np.frombuffer(head.encode(), np.uint8) - ord("0"), body])).tobytes()
