"""Archive products and no data: labels are believed within the limits, and nothing but ImageError comes of bad ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from raysal.archive.fetch import fetch_image, fetch_label
from raysal.errors import ImageError
from raysal.images.decode import black_border, decode, stretch
from raysal.images.products import read_product

LIMIT = 10_000
WIDE_HW = np.random.default_rng(0).integers(100, 4096, (12, 20)).astype(">i2")
WIDE_HW[:2] = 0  # the missing constant


def pds3(array: np.ndarray, pointer: str, extra: str = "", **other: object) -> bytes:
    """A PDS3 label with an IMAGE object of an array [H, W] or [B, H, W]."""
    bands = array.shape[0] if array.ndim == 3 else 1
    keys = {"LINES": array.shape[-2], "LINE_SAMPLES": array.shape[-1], "BANDS": bands, **other}
    kind = {"u": "MSB_UNSIGNED_INTEGER", "i": "MSB_INTEGER", "f": "IEEE_REAL"}[array.dtype.kind]
    body = "".join(f"  {key} = {value}\r\n" for key, value in keys.items())
    return (
        f"PDS_VERSION_ID = PDS3\r\nRECORD_TYPE = FIXED_LENGTH\r\nRECORD_BYTES = 2000\r\nFILE_RECORDS = 9\r\n^IMAGE = {pointer}\r\n"
        f"OBJECT = IMAGE\r\n{body}  SAMPLE_TYPE = {kind}\r\n  SAMPLE_BITS = {array.itemsize * 8}\r\n"
        f"  BAND_STORAGE_TYPE = BAND_SEQUENTIAL\r\n{extra}END_OBJECT = IMAGE\r\nEND\r\n"
    ).encode()


def attached(array: np.ndarray, extra: str = "", **other: object) -> bytes:
    return pds3(array, "2", extra, **other).ljust(2000, b" ") + array.tobytes()


def pds4(array: np.ndarray, data_type: str, axes: tuple[str, ...], file: str, special: str = "") -> bytes:
    listed = "".join(
        f"<Axis_Array><axis_name>{axis}</axis_name><elements>{n}</elements><sequence_number>{i}</sequence_number></Axis_Array>"
        for i, (axis, n) in enumerate(zip(axes, array.shape, strict=True), 1)
    )
    kind = f"Array_{array.ndim}D_Image"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Product_Observational xmlns="http://pds.nasa.gov/pds4/pds/v1">'
        "<Identification_Area><logical_identifier>urn:nasa:pds:a:b:c</logical_identifier><version_id>1.0</version_id><title>t</title>"
        "<information_model_version>1.14.0.0</information_model_version><product_class>Product_Observational</product_class>"
        f"</Identification_Area><File_Area_Observational><File><file_name>{file}</file_name></File><{kind}>"
        f'<local_identifier>image</local_identifier><offset unit="byte">0</offset><axes>{array.ndim}</axes>'
        f"<axis_index_order>Last Index Fastest</axis_index_order><Element_Array><data_type>{data_type}</data_type></Element_Array>"
        f"{listed}{special}</{kind}></File_Area_Observational></Product_Observational>"
    ).encode()


def vicar(array_BHW: np.ndarray, kind: str, org: str = "BSQ", more: str = "") -> bytes:
    b, h, w = array_BHW.shape
    stored = array_BHW.transpose({"BSQ": (0, 1, 2), "BIL": (1, 0, 2), "BIP": (1, 2, 0)}[org])
    n3, n2, n1 = stored.shape
    text = (
        f"LBLSIZE={{size}} FORMAT='{kind}' TYPE='IMAGE' BUFSIZ=2048 DIM=3 EOL=0 RECSIZE={n1 * array_BHW.itemsize} ORG='{org}' "
        f"NL={h} NS={w} NB={b} N1={n1} N2={n2} N3={n3} N4=0 NBB=0 NLB=0 HOST='X86-LINUX' INTFMT='LOW' REALFMT='RIEEE' "
        f"BHOST='X86-LINUX' BINTFMT='LOW' "
        f"BREALFMT='RIEEE' BLTYPE='' COMPRESS='NONE' EOCI1=0 EOCI2=0 {more}"
    )
    record = n1 * array_BHW.itemsize
    size = -(-(len(text) + 20) // record) * record
    return text.format(size=size).encode().ljust(size, b"\0") + stored.tobytes()


# ---------------------------------------------------------------- what decodes


@pytest.mark.parametrize("detached", [False, True])
def test_pds3_with_its_label_inside_or_beside(detached: bool) -> None:
    extra = "  MISSING_CONSTANT = 0\r\n"
    if detached:
        data, label = WIDE_HW.tobytes(), pds3(WIDE_HW, '("NLB_1.IMG", 1)', extra)
    else:
        data, label = attached(WIDE_HW, extra), None
    found = read_product(data, label, LIMIT, 4, "s3://archive/sol/nlb_1.img")
    np.testing.assert_array_equal(found.values_HWB[:, :, 0], WIDE_HW)
    np.testing.assert_array_equal(found.valid_HW, WIDE_HW != 0)


@pytest.mark.parametrize("axes", [("Band", "Line", "Sample"), ("Line", "Sample", "Band"), ("Line", "Band", "Sample")])
def test_pds4_cubes_come_as_bands_last_whatever_their_order(axes: tuple[str, ...]) -> None:
    cube_BHW = np.random.default_rng(1).integers(0, 256, (3, 7, 9), dtype=np.uint8)
    stored = np.ascontiguousarray(cube_BHW.transpose([("Band", "Line", "Sample").index(axis) for axis in axes]))
    label = pds4(stored, "UnsignedByte", axes, "cube.raw")
    found = read_product(stored.tobytes(), label, LIMIT, 4, "/data/cube.raw")
    np.testing.assert_array_equal(found.values_HWB, cube_BHW.transpose(1, 2, 0))


def test_pds4_codes_are_no_data() -> None:
    stored = np.array([[5.0, -1.0, np.nan], [7.0, -3.4e38, 9.0]], "<f4")
    special = "<Special_Constants><missing_constant>-1.0</missing_constant></Special_Constants>"
    label = pds4(stored, "IEEE754LSBSingle", ("Line", "Sample"), "a.dat", special)
    found = decode(stored.tobytes(), LIMIT, "a.dat", lambda: label)
    np.testing.assert_array_equal(found.valid_HW, [[True, False, False], [True, False, True]])
    np.testing.assert_array_equal(found.image_HWC[:, :, 1], [[0, 0, 0], [127, 0, 255]])


@pytest.mark.parametrize("org", ["BSQ", "BIL", "BIP"])
@pytest.mark.parametrize(("kind", "dtype"), [("BYTE", "u1"), ("HALF", "<i2"), ("REAL", "<f4")])
def test_vicar_in_every_order(org: str, kind: str, dtype: str) -> None:
    array_BHW = np.random.default_rng(2).integers(0, 200, (3, 6, 8)).astype(dtype)
    found = read_product(vicar(array_BHW, kind, org), None, LIMIT, 4, "a.vic")
    np.testing.assert_array_equal(found.values_HWB, array_BHW.transpose(1, 2, 0))


@pytest.mark.parametrize("item", ["A=1 ", "TASK='X' ", "K=(1,1,1) ", "A=(", "A=' ' ", "AB=(1", "A" * 500, "NL = ", "MISSING_CONSTANT=((("])
def test_a_vicar_label_costs_its_parser_what_is_used_of_it(item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import vicar as library

    given, read = [], library.VicarLabel.from_file
    monkeypatch.setattr(library.VicarLabel, "from_file", lambda path: given.append(Path(path).read_bytes()) or read(path))
    array_BHW = np.arange(48, dtype=np.uint8).reshape(1, 6, 8)
    found = read_product(vicar(array_BHW, "BYTE", more="MISSING_CONSTANT=(7,9) " + item * (100_000 // len(item))), None, LIMIT, 4, "a.vic")
    assert len(given[0].rstrip(b"\0")) < 600
    np.testing.assert_array_equal(found.values_HWB[:, :, 0], array_BHW[0])
    np.testing.assert_array_equal(found.valid_HW, ~np.isin(array_BHW[0], (7, 9)))


def test_what_follows_the_pixels_of_a_vicar_file_is_left_out() -> None:
    array_BHW = np.arange(48, dtype=np.uint8).reshape(1, 6, 8)
    data = vicar(array_BHW, "BYTE").replace(b"EOL=0", b"EOL=1") + b"LBLSIZE=64 A=1 ".ljust(64, b"\0") + bytes(99)
    np.testing.assert_array_equal(read_product(data, None, LIMIT, 4, "a.vic").values_HWB[:, :, 0], array_BHW[0])


def test_of_many_bands_three_are_used_where_so_many_are_allowed() -> None:
    cube_BHW = np.random.default_rng(3).integers(0, 256, (6, 5, 8), dtype=np.uint8)
    with pytest.raises(ImageError, match=r"6 bands are more than 4; raise data\.max_bands") as caught:
        read_product(vicar(cube_BHW, "BYTE"), None, LIMIT, 4, "a.vic")
    assert caught.value.status == "limit"
    found = read_product(vicar(cube_BHW, "BYTE"), None, LIMIT, 6, "a.vic")
    np.testing.assert_array_equal(found.values_HWB, cube_BHW[:3].transpose(1, 2, 0))


def test_a_label_beside_is_found_by_name_and_pictures_have_none(tmp_path: Path) -> None:
    (tmp_path / "a b.RAW").write_bytes(b"x")
    (tmp_path / "a b.xml").write_bytes(b"<label/>")
    (tmp_path / "a b.jpg").write_bytes(b"x")
    assert fetch_label(str(tmp_path / "a b.RAW")) == b"<label/>"
    assert fetch_label(str(tmp_path / "a b.jpg")) is None and fetch_label(str(tmp_path / "other.RAW")) is None


# ---------------------------------------------------------------- bad labels


def test_a_label_that_promises_more_than_there_is_costs_no_memory() -> None:
    bomb = attached(WIDE_HW, LINES=90_000, LINE_SAMPLES=90_000)
    with pytest.raises(ImageError, match=r"90000 x 90000 is more than") as caught:
        read_product(bomb, None, LIMIT, 4, "bomb.img")
    assert caught.value.status == "limit"
    with pytest.raises(ImageError, match="cut off: its label promises 16000 bytes of pixels") as caught:
        read_product(attached(WIDE_HW, LINES=400), None, LIMIT, 4, "cut.img")
    assert caught.value.status == "decode"


def test_a_label_of_another_file_is_refused() -> None:
    with pytest.raises(ImageError, match=r"the label beside it names 'OTHER\.IMG'"):
        read_product(WIDE_HW.tobytes(), pds3(WIDE_HW, '("OTHER.IMG", 1)'), LIMIT, 4, "a.img")
    with pytest.raises(ImageError, match="the label beside it names"):  # nor is a path followed out of the folder
        read_product(WIDE_HW.tobytes(), pds3(WIDE_HW, '("../../etc/a.img", 1)'), LIMIT, 4, "a.img")


@pytest.mark.parametrize("pointer", ['("{}", 1)', '"{}"', "'{}'", '("..{}", 1)'])
def test_no_pds3_label_opens_another_file_of_this_machine(tmp_path: Path, pointer: str) -> None:
    (secret := tmp_path / "secret.img").write_bytes(b"S" * 5000)
    label = pds3(WIDE_HW, pointer.format(secret))
    with pytest.raises(ImageError):
        read_product(label.ljust(4000, b" "), None, LIMIT, 4, "a.img")
    beside = label.replace(b"^IMAGE", b'^NOTE = "see" /* ^IMAGE = ("a.img", 1) */\r\n^IMAGE', 1)
    with pytest.raises(ImageError):
        read_product(WIDE_HW.tobytes(), beside, LIMIT, 4, "a.img")


@pytest.mark.parametrize(
    "hidden", ["<file_name>{}</file_name>", "<file_name><!-- -->{}</file_name>", "<pds:file_name xmlns:pds='x'>{}</pds:file_name>"]
)
def test_no_pds4_label_opens_another_file_of_this_machine(tmp_path: Path, hidden: str) -> None:
    (secret := tmp_path / "secret.raw").write_bytes(b"S" * 5000)
    whole = pds4(WIDE_HW, "SignedMSB2", ("Line", "Sample"), "a.raw").decode()
    name = "<file_name>a.raw</file_name>"
    for bad in (whole.replace(name, hidden.format(secret) + name), whole.replace(name, f"<!-- {name} -->{hidden.format(secret)}")):
        with pytest.raises(ImageError):
            read_product(WIDE_HW.tobytes(), bad.encode(), LIMIT, 4, "a.raw")


def test_xml_entities_are_refused() -> None:
    label = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb">]><a>&b;</a>'
    with pytest.raises(ImageError, match="entities"):
        read_product(b"x", label, LIMIT, 4, "a.raw")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_products_are_rows_and_never_crashes(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["pds3", "vicar", "pds4", "noise"]))
    whole = {
        "pds3": attached(WIDE_HW),
        "vicar": vicar(np.zeros((1, 6, 8), np.uint8), "BYTE"),
        "pds4": pds4(WIDE_HW, "SignedMSB2", ("Line", "Sample"), "a.raw"),
        "noise": b"PDS_VERSION_ID" + data.draw(st.binary(max_size=200)),
    }[kind]
    where = data.draw(st.integers(0, len(whole) - 1))
    bad = whole[:where] + data.draw(st.binary(max_size=8)) + whole[where + data.draw(st.integers(0, 40)) :]
    try:
        if kind == "pds4":
            found = decode(WIDE_HW.tobytes(), LIMIT, "a.raw", lambda: bad)
        else:
            found = decode(bad, LIMIT, "a.img")
    except ImageError as error:
        assert error.status in ("decode", "limit")
    else:
        assert found.image_HWC.dtype == np.uint8 and found.image_HWC.shape == (*found.valid_HW.shape, 3)


# ---------------------------------------------------------------- stretch and borders


def test_stretch_leaves_out_what_is_not_valid() -> None:
    values_HWB = np.array([[[-32768], [100], [200], [300]]], np.int16)
    found = stretch(values_HWB, np.array([[False, True, True, True]]))
    np.testing.assert_array_equal(found[0, :, 0], [0, 0, 127, 255])
    assert not stretch(values_HWB, np.zeros((1, 4), bool)).any()


def test_black_at_the_edge_is_no_data_and_black_inside_is_a_shadow() -> None:
    image_HWC = np.full((40, 50, 3), 90, np.uint8)
    image_HWC[:10, 30:] = 0  # a corner of a mosaic
    image_HWC[20:30, 10:20] = 0  # a shadow
    image_HWC[39, :4] = 0  # too little for a border
    expected_HW = np.zeros((40, 50), bool)
    expected_HW[:10, 30:] = True
    np.testing.assert_array_equal(black_border(image_HWC), expected_HW)
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    np.testing.assert_array_equal(decode(file.getvalue(), LIMIT, "a").valid_HW, ~expected_HW)
    assert decode(file.getvalue(), LIMIT, "a", borders=False).valid_HW.all()


def test_transparent_pixels_are_no_data() -> None:
    rgba_HWC = np.full((4, 6, 4), 200, np.uint8)
    rgba_HWC[1, 2, 3] = 0
    file = io.BytesIO()
    Image.fromarray(rgba_HWC).save(file, "PNG")
    np.testing.assert_array_equal(decode(file.getvalue(), LIMIT, "a").valid_HW, rgba_HWC[:, :, 3] > 0)


# ---------------------------------------------------------------- real ones


@pytest.mark.data
def test_real_products_decode(shared: Path) -> None:
    sizes = {}
    for file in sorted((shared / "data/pds").glob("*/*")):
        if file.suffix.lower() in (".img", ".raw"):
            found = decode(fetch_image(str(file), 2**24), 2**21, str(file), lambda file=file: fetch_label(str(file)))
            sizes[file.name] = found.valid_HW.shape
            assert 15 < found.image_HWC.mean() < 200 and found.image_HWC.std() > 15 and found.valid_HW.mean() > 0.99
    assert sizes == {
        "FLB_431397159EDR_F0141262FHAZ00323M1.IMG": (1024, 1024),
        "NLB_516721703EDR_F0540992CCAM15900M1.IMG": (1024, 1024),
        "NLB_519216253EDR_F0542784CCAM15900M1.IMG": (1024, 1024),
        "C000M5232T493378259EDR_F0000_0134M1.IMG": (1024, 1024),
        "i943630r.raw": (248, 256),
    }


@pytest.mark.data
def test_black_borders_of_real_mosaics_are_what_experts_left_blank(shared: Path) -> None:
    folder, border, labelled = shared / "data/mars", 0, 0
    for file in sorted((folder / "images").glob("*.jpg"))[::12]:
        border_HW = black_border(np.asarray(Image.open(file).convert("RGB")))
        border += int(border_HW.sum())
        labelled += int((np.asarray(Image.open(folder / "masks" / f"{file.stem}.png"))[border_HW] != 255).sum())
    assert border > 100_000 and labelled <= border / 10_000
