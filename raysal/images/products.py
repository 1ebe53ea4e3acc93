"""Images as planetary archives keep them: PDS3 with an attached or detached label, PDS4, VICAR; parsed by pdr and rms-vicar.

Labels are text from anywhere: what they claim (size, bands, names of files) is checked against the limits and against the bytes that
are there before any pixel is read.
"""

from __future__ import annotations

import errno
import posixpath
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from raysal.errors import ImageError, ResourceError

PDS3 = (b"PDS_VERSION_ID", b"ODL_VERSION_ID", b"CCSD3ZF", b"NJPL1I00PDS")
"""How a file with an attached PDS3 label begins; the last two are SFDU lines before it."""

VICAR = b"LBLSIZE="

MAX_LABEL_BYTES = 2**20
"""Real ones have 10 to 60 kB; on this much, whatever it says, parsers of PDS3 and PDS4 take two seconds."""

VICAR_ITEM = re.compile(rb"(?<![A-Z0-9_])([A-Z][A-Z0-9_]{0,31}) *= *('(?:[^']|'')*'|\([^()]{0,500}\)|[-+.0-9A-Z]{1,40})")
"""A name and its value: text, a list, a number."""

MAX_ITEM_BYTES = 80
"""Of a VICAR value; the items that are used are numbers, short words and lists of a few numbers."""

NO_DATA = ("MISSING_CONSTANT", "INVALID_CONSTANT", "CORE_NULL", "NULL", "UNKNOWN_CONSTANT", "NOT_APPLICABLE_CONSTANT")
"""Names of values that stand for no measurement. Saturated pixels are measurements."""

VICAR_ITEMS = (
    *("FORMAT", "TYPE", "BUFSIZ", "DIM", "RECSIZE", "ORG", "NL", "NS", "NB", "N1", "N2", "N3", "N4", "NBB", "NLB"),
    *("HOST", "INTFMT", "REALFMT", "BHOST", "BINTFMT", "BREALFMT", "BLTYPE", "COMPRESS", *NO_DATA),
)
"""Names of what is used of a VICAR label."""

SPECIAL = 1e30
"""Real numbers beyond this are codes: ISIS and VICAR write no data as about -3.4e38."""


@dataclass(frozen=True)
class Samples:
    """An image as its instrument counted.

    Attributes:
        values_HWB: Any integer or real type; 1 or 3 bands.
        valid_HW: bool; False where the label's codes say that there is no data.
    """

    values_HWB: np.ndarray
    valid_HW: np.ndarray


@dataclass(frozen=True)
class Layout:
    """What a label says of its image. `no_data` holds the values that stand for none."""

    height: int
    width: int
    bands: int
    sample_bytes: int
    no_data: tuple[float, ...]

    def bands_first(self, array: np.ndarray) -> np.ndarray:
        """[B, H, W] of an array that may lack the axis of bands."""
        return array.reshape(-1, self.height, self.width) if array.ndim == 2 else array


def attached(data: bytes) -> bool:
    """Whether the bytes begin with a PDS3 or VICAR label of their own."""
    return data.startswith((*PDS3, VICAR))


def read_product(data: bytes, label: bytes | None, max_pixels: int, max_bands: int, name: str) -> Samples:
    """Reads a product's image.

    Args:
        data: The whole data file.
        label: The whole detached label; None where the data begins with its own.
        max_pixels, max_bands: Largest image to accept, by its label.
        name: What error messages call the file, usually its URI.

    Returns:
        Of more than three bands the first three, of two the first.

    Raises:
        ImageError: ``limit`` or ``decode``.
        ResourceError: No space for temporary files, which is not the product's fault.
    """
    if label is not None and len(label) > MAX_LABEL_BYTES:
        raise ImageError("limit", f"{name}: its label has {len(label)} bytes, over {MAX_LABEL_BYTES}; that is no label")

    def check(layout: Layout) -> None:
        _check(layout, max_pixels, max_bands, len(data), name)

    # Both libraries read files. Each product gets a folder of its own, and labels must not point out of it.
    try:
        with tempfile.TemporaryDirectory(prefix="raysal-") as folder:
            read = _read_vicar if label is None and data.startswith(VICAR) else _read_pds
            values_BHW, layout = read(Path(folder), data, label, check, name)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = tempfile.gettempdir()
        raise ResourceError(f"{place}: no space left for temporary files; free some, or name another place by TMPDIR") from error
    if values_BHW.shape[-2:] != (layout.height, layout.width):
        found = f"{values_BHW.shape[-1]} x {values_BHW.shape[-2]}" if values_BHW.ndim >= 2 else "end early"
        raise ImageError("decode", f"{name}: its label says {layout.width} x {layout.height} pixels, its data {found}; fetch it again")
    valid_BHW = measured(values_BHW)
    for code in layout.no_data:
        valid_BHW &= values_BHW != code
    used = 3 if len(values_BHW) >= 3 else 1
    valid_HW: np.ndarray = np.logical_or.reduce(valid_BHW[:used], axis=0)
    return Samples(np.moveaxis(values_BHW[:used], 0, -1), valid_HW)


def measured(values: np.ndarray) -> np.ndarray:
    """Which samples can be measurements at all: bool of the same shape; False for NaN, infinity and codes beyond `SPECIAL`."""
    if values.dtype.kind != "f":
        return np.ones(values.shape, bool)
    with np.errstate(invalid="ignore"):
        good: np.ndarray = np.abs(values) < SPECIAL
    return good


Check = Callable[[Layout], None]


def _check(layout: Layout, max_pixels: int, max_bands: int, n_bytes: int, name: str) -> None:
    h, w, b = layout.height, layout.width, layout.bands
    if h < 1 or w < 1 or b < 1:
        raise ImageError("decode", f"{name}: its label says {w} x {h} pixels of {b} bands; fetch it again")
    if h * w > max_pixels:
        raise ImageError("limit", f"{name}: {w} x {h} is more than {max_pixels} pixels; raise data.max_pixels if such images are wanted")
    if b > max_bands:
        raise ImageError("limit", f"{name}: {b} bands are more than {max_bands}; raise data.max_bands to use the first three")
    if (needed := h * w * b * layout.sample_bytes) > n_bytes:
        raise ImageError("decode", f"{name}: cut off: its label promises {needed} bytes of pixels, the file has {n_bytes}; fetch it again")


def _read_vicar(folder: Path, data: bytes, label: bytes | None, check: Check, name: str) -> tuple[np.ndarray, Layout]:
    import vicar  # slow to import, and few archives need it

    size, path = re.match(rb"LBLSIZE=\s*(\d{1,9})\s", data), folder / "image.vic"
    if size is None or not 0 < int(size[1]) <= min(len(data), MAX_LABEL_BYTES):
        raise ImageError("decode", f"{name}: a VICAR file whose label has no size that fits it; fetch it again")
    path.write_bytes(_vicar_label(data, int(size[1])))
    found: Any = vicar.VicarLabel.from_file(path)
    widths = {"BYTE": 1, "HALF": 2, "WORD": 2, "FULL": 4, "LONG": 4, "REAL": 4, "DOUB": 8}
    kind, org = str(found.get("FORMAT", "")), str(found.get("ORG", "BSQ"))
    if kind not in widths:
        raise ImageError("decode", f"{name}: VICAR samples of type {kind!r} are no image")
    height, width, bands = (int(found.get(key, 1)) for key in ("NL", "NS", "NB"))
    layout = Layout(height, width, bands, widths[kind], _codes(found))
    check(layout)
    records = int(found["NLB"]) + height * (width if org == "BIP" else bands)
    with path.open("ab") as file:
        file.write(memoryview(data)[int(size[1]) : int(size[1]) + records * int(found["RECSIZE"])])
    image: Any = vicar.VicarImage.from_file(path, strict=False)
    order = {"BSQ": (0, 1, 2), "BIL": (1, 0, 2), "BIP": (2, 0, 1)}[org]
    return np.asarray(image.array).transpose(order), layout


def _vicar_label(data: bytes, size: int) -> bytes:
    """A label of the same size with nothing but the items that are used: the parser takes seconds for a few kilobytes of hostile ones."""
    items: dict[bytes, bytes] = {}
    for found in VICAR_ITEM.finditer(data[:size].partition(b"\0")[0]):
        if len(found[2]) <= MAX_ITEM_BYTES:
            items.setdefault(found[1], found[2])
    used = [(key.encode(), items[key.encode()]) for key in VICAR_ITEMS if key.encode() in items]
    return b" ".join([b"LBLSIZE=%d" % size, *(key + b"=" + value for key, value in used)]).ljust(size, b"\0")


def _read_pds(folder: Path, data: bytes, label: bytes | None, check: Check, name: str) -> tuple[np.ndarray, Layout]:
    import pdr  # as above

    warnings.filterwarnings("ignore", module=r"pdr\.")  # of what it could not load; that shows below

    xml = label is not None and label.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<")
    if label is None:
        path = folder / "image.img"
    else:
        if xml:
            _check_xml(label, name)
        (folder / _data_name(label, xml, name)).write_bytes(data)
        path = folder / ("label.xml" if xml else "label.lbl")
    path.write_bytes(data if label is None else label)
    product = pdr.read(str(path))
    for pointer in _pointers(product.metadata):
        _check_name(pointer, name)
    key, layout, order = _pds4(product, name) if xml else _pds3(product, name)
    check(layout)
    array = np.ma.getdata(product[key])  # pdr masks some codes; ours are of both standards
    return layout.bands_first(array.transpose(order) if order else array), layout


def _pds3(product: Any, name: str) -> tuple[str, Layout, None]:
    """The key of a PDS3 product's image, what its label says, and no order of axes: pdr puts bands first."""
    block = product.metablock_("IMAGE")
    objects = list(product.keys())
    if block is None or "IMAGE" not in objects:
        raise ImageError("decode", f"{name}: its label has no IMAGE object (it has {', '.join(map(str, objects))})")
    sample_bytes = max(1, int(block["SAMPLE_BITS"]) // 8)
    return "IMAGE", Layout(int(block["LINES"]), int(block["LINE_SAMPLES"]), int(block.get("BANDS", 1)), sample_bytes, _codes(block)), None


def _pds4(product: Any, name: str) -> tuple[str, Layout, list[int]]:
    """The key of a PDS4 product's image, what its label says, and the axes of its array in the order bands, lines, samples."""
    key, block = _array_block(product, name)
    sizes = {str(axis["axis_name"]).lower(): int(axis["elements"]) for axis in block.getall("Axis_Array")}
    if not {"line", "sample"} <= set(sizes) <= {"line", "sample", "band"}:
        raise ImageError("decode", f"{name}: an array over {', '.join(sizes)} is no image of lines and samples")
    width = re.search(r"(\d)$", str(block["Element_Array"]["data_type"]))  # UnsignedMSB2, IEEE754LSBSingle; UnsignedByte
    layout = Layout(
        sizes["line"], sizes["sample"], sizes.get("band", 1), int(width[1]) if width else 1, _codes(block.get("Special_Constants", {}))
    )
    return key, layout, [list(sizes).index(axis) for axis in ("band", "line", "sample") if axis in sizes]


def _array_block(product: Any, name: str) -> tuple[str, Any]:
    """The image array of a PDS4 product, by its key in pdr and its block of the label."""
    for kind in ("Array_2D_Image", "Array_3D_Image"):
        block = product.metablock_(kind)
        if block is None:
            continue
        wanted = re.sub(r"\W", "_", str(block.get("local_identifier", block.get("name", ""))))
        arrays = [key for key in list(product.keys()) if key != "label" and "header" not in key.lower()]
        same = [key for key in arrays if re.sub(r"\W", "_", key) == wanted] or arrays
        if same:
            return same[0], block
    raise ImageError("decode", f"{name}: its PDS4 label describes no Array_2D_Image or Array_3D_Image")


def _check_xml(label: bytes, name: str) -> None:
    if re.search(rb"<!\s*(DOCTYPE|ENTITY)", label):
        raise ImageError("decode", f"{name}: its label defines entities, which no PDS4 label does; look at it by itself")
    for element in ElementTree.fromstring(label).iter():
        if str(element.tag).endswith("file_name"):
            _check_name("".join(element.itertext()), name)


def _pointers(block: Any) -> Iterator[str]:
    """Every file that a PDS3 label points at, in objects within objects too."""
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _pointers(value)
        elif str(key).startswith("^"):
            yield from (str(part) for part in (value if isinstance(value, (tuple, list, set)) else [value]))


def _check_name(pointer: str, name: str) -> None:
    """A pointer that holds a path would make the library open another file of this machine and show its bytes as pixels."""
    if "/" in pointer or "\\" in pointer:
        raise ImageError(
            "decode", f"{name}: its label points at {pointer.strip()[:80]!r}; labels name files, not paths. Look at it by itself"
        )


def _data_name(label: bytes, xml: bool, name: str) -> str:
    """The file that a detached label names, without folders."""
    pattern = rb"<file_name>\s*([^<]{1,255}?)\s*</file_name>" if xml else rb"\^IMAGE\s*=\s*\(?\s*\"([^\"]{1,255})\""
    own = posixpath.basename(name.split("::", 1)[0]).lower()
    names = [found.decode("utf-8", "replace") for found in re.findall(pattern, label)]
    fit = [found for found in names if found.lower() == own]
    if not fit:
        said = f"names {names[0][:80]!r}" if names else "names no data file"
        raise ImageError("decode", f"{name}: the label beside it {said}; put the right label there")
    return fit[0]


def _codes(block: Mapping[str, Any]) -> tuple[float, ...]:
    found: list[float] = []
    for key in (*NO_DATA, *(key.lower() for key in NO_DATA)):
        value = block.get(key, None)
        for one in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            try:
                found.append(float(one))
            except (TypeError, ValueError):  # "N/A", or a bit pattern; those are beyond SPECIAL
                continue
    return tuple(found)
