"""Product names: each field is what the mission's own labels say, whatever case, folder or suffix the name comes in; filters by them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from raysal.archive.filters import TAKEN, Filters, Range, kinds, ranges, size
from raysal.archive.names import (
    DERIVED,
    KINDS,
    M2020_CAMERAS,
    MER_IMAGES,
    MER_SUBFRAMES,
    MER_THUMBNAILS,
    MMM_THUMBNAILS,
    MSL_CAMERAS,
    Product,
    _counter,
    _mer_counter,
    parse,
)
from raysal.errors import InputError

REAL = {
    # Site, drive, sequence and sol as in these products' PDS labels.
    "NLB_516721703EDR_F0540992CCAM15900M1.IMG": ("msl", "navcam_left", None, 54, 992, "CCAM15900", "image"),
    "FLB_431397159EDR_F0141262FHAZ00323M1.IMG": ("msl", "hazcam_front_left", None, 14, 1262, "FHAZ00323", "image"),
    "0710MR0030170000402526E01_DRLX.LBL": ("msl", "mastcam_right", 710, None, None, "MCAM03017", "image"),
    "0017MR0000500310100103I01_XXXX.LBL": ("msl", "mastcam_right", 17, None, None, "MCAM00050", "thumbnail"),
    "data/sol1860/rdr/2p291489372xylb0ltp2356l2m1.img": ("mer2", "pancam_left", 1860, 136, 525, "P2356", "derived"),
    "data/sol1354/rdr/2n246563688smnavqff0006l0m1.img": ("mer2", "navcam_left", 1354, 131, 691, "F0006", "derived"),
    "data/sol1252/rdr/2n237528526sllaucmp1593l0m1.img": ("mer2", "navcam_left", 1252, 130, 194, "P1593", "derived"),
    "data/sol2165/rdr/2r318573382rnnb2zjp1336l0m1.img": ("mer2", "hazcam_rear_left", 2165, 138, 1019, "P1336", "derived"),
    "data/sol0009/rdr/2n127168412sln0211p1515l0m1.img": ("mer2", "navcam_left", 9, 2, 11, "P1515", "derived"),
    # Public raw images.
    "https://mars.nasa.gov/msl-raw-images/proj/msl/redops/ods/surface/sol/03027/opgs/edr/fcam/FLB_666219749EDR_F0860978FHAZ00302M_.JPG":
        ("msl", "hazcam_front_left", 3027, 86, 978, "FHAZ00302", "image"),
    "FLB_666219749EDR_F0860978FHAZ00302M_-thm.jpg": ("msl", "hazcam_front_left", None, 86, 978, "FHAZ00302", "thumbnail"),
    "FRA_397502305EDR_D0010000AUT_04096M_.JPG": ("msl", "hazcam_front_right", None, 1, 0, "AUT_04096", "image"),
    "CR0_654932925PRC_F0822176CCAM02899L1.PNG": ("msl", "chemcam_rmi", None, 82, 2176, "CCAM02899", "image"),
    "0001ML0000001000C0_DXXX.jpg": ("msl", "mastcam_left", 1, None, None, "MCAM00000", "image"),
    "0001MR0000001000I1_DXXX.jpg": ("msl", "mastcam_right", 1, None, None, "MCAM00000", "thumbnail"),
    "2840MR0148590720704886C00_DXXX.JPG": ("msl", "mastcam_right", 2840, None, None, "MCAM14859", "image"),
    "0303MH0002910020103720C00": ("msl", "mahli", 303, None, None, "MHLI00291", "image"),
    "http://mars.nasa.gov/mer/gallery/all/1/f/001/1F128285236EDN0000P1001L0M1-BR.JPG":
        ("mer1", "hazcam_front_left", 1, 0, 0, "P1001", "image"),
    "2F127262938EFF0218P1003R0M1.JPG": ("mer2", "hazcam_front_right", None, 2, 18, "P1003", "image"),
    "NLF_0100_0673158398_650ECM_N0060000NCAM00900_01_295J01.png": ("m2020", "navcam_left", 100, 6, 0, "NCAM00900", "image"),
    "NLE_0015_0668275677_973ECM_N0030188NCAM00400_08_0LLJ01.png": ("m2020", "navcam_left", 15, 3, 188, "NCAM00400", "tile"),
    "NRM_0002_0667130166_842ECM_T0010052AUT_04096_00_4I1J01": ("m2020", "navcam_right", 2, 1, 52, "AUT_04096", "thumbnail"),
    "NLF_1396_0790870193_597ECM_N0650000NCAM00501_01_295J01_1200.jpg": ("m2020", "navcam_left", 1396, 65, 0, "NCAM00501", "image"),
    "NLF_1396_0790870193_597ECM_N0650000NCAM00501_01_295J01_320.jpg": ("m2020", "navcam_left", 1396, 65, 0, "NCAM00501", "thumbnail"),
    "Mars_Perseverance_ZL0_0676_0726954245_738ECM_N0320774ZCAM03518_1100LMJ.png":
        ("m2020", "mastcamz_left", 676, 32, 774, "ZCAM03518", "image"),
    "ZL0_0180_0682919878_394IOF_N0062666ZCAM03014_048085A02.IMG": ("m2020", "mastcamz_left", 180, 6, 2666, "ZCAM03014", "image"),
    "SI1_0030_0669612176_172ECM_N0030828SRLC07000_0000LUJ01.png": ("m2020", "sherloc_watson", 30, 3, 828, "SRLC07000", "image"),
    "LRE_0662_0725708607_592ECM_N0320378SCAM01662_0100I6J02.png": ("m2020", "supercam_rmi", 662, 32, 378, "SCAM01662", "image"),
    "ELM_0000_0666952774_000FDR_N0000001LVS_04000_0000LUJ01.IMG": ("m2020", "edl_lander_vision", 0, 0, 1, "LVS_04000", "image"),
    # Data sets.
    "SOL01343NLB_516721703EDR_F0540992CCAM15900M1-112.png": ("msl", "navcam_left", 1343, 54, 992, "CCAM15900", "image"),
    "NLA_397586928MXY_F0010008AUT_04096M1.png": ("msl", "navcam_left", None, 1, 8, "AUT_04096", "derived"),
    "NLA_397586928RNG_F0010008AUT_04096M1.png": ("msl", "navcam_left", None, 1, 8, "AUT_04096", "derived"),
    "NLA_397586928EDR_F0010008AUT_04096M1_T0_merged.png": ("msl", "navcam_left", None, 1, 8, "AUT_04096", "image"),
    "sol0122_1_r0c00.jpg": ("msl", "mastcam", 122, None, None, None, "image"),
    "sol0416_1.png": ("msl", "mastcam", 416, None, None, None, "image"),
}  # fmt: skip


def fields(p: Product) -> tuple:
    return p.mission, p.camera, p.sol, p.site, p.drive, p.sequence, p.kind


@pytest.mark.parametrize("name", REAL)
def test_real_names_say_what_their_labels_say(name: str) -> None:
    assert fields(parse(name)) == REAL[name]


def with_an_index(name: str) -> str:
    """As tools name the second copy of a file; unchanged where the name has an ending of its own."""
    return name if re.search(r"-|_320|sol0", name.rpartition("/")[2]) else re.sub(r"(\.\w+)?$", r"_2\1", name, count=1)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "dressed",
    [
        str.lower,
        str.upper,
        lambda n: re.sub(r"\.\w+$", "", n),
        lambda n: f"{n}?width=320&x=a/b" if n.startswith("http") else n,
        with_an_index,
    ],
    ids=["lower", "upper", "no suffix", "query", "index"],
)
def test_case_suffix_query_and_an_index_do_not_matter(name: str, dressed: Callable[[str], str]) -> None:
    assert fields(parse(dressed(name))) == REAL[name]


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("a/nlb_516721703edr_f0540992ccam15900m1.img", "NLB_516721703EDR_F0540992CCAM15900M1"),
        ("0710MR0030170000402526E01_DRLX.LBL", "0710MR0030170000402526E01_DRLX"),
        ("2p291489372xylb0ltp2356l2m1.img", "2P291489372XYLB0LTP2356L2M1"),
        ("NLF_1396_0790870193_597ECM_N0650000NCAM00501_01_295J01_1200.jpg", "NLF_1396_0790870193_597ECM_N0650000NCAM00501_01_295J01"),
        ("sol0122_1_r0c00.jpg", "sol0122_1_r0c00"),
        ("holiday.jpg", None),
    ],
)
def test_the_product_is_the_name_without_what_was_added(name: str, product: str | None) -> None:
    assert parse(name).product == product


def test_the_shared_archives_are_understood(shared: Path) -> None:
    """Real files: every product of the missions told is recognised, the rest are images of which nothing is known."""
    pds = {p.name: parse(p.name) for p in (shared / "data/pds").rglob("*") if p.suffix.lower() in (".img", ".raw")}
    assert {n: p.mission for n, p in pds.items() if p.mission is None} == {
        "i943630r.raw": None,
        "C000M5232T493378259EDR_F0000_0134M1.IMG": None,
    }
    for label in (shared / "data/pds").rglob("*.LBL"):
        text, product = label.read_text(), parse(label.name)
        counter = re.search(r"ROVER_MOTION_COUNTER\s*=\s*\((\d+),(\d+),", text)
        sequence = re.search(r'SEQUENCE_ID\s*=\s*"(\w+)"', text)
        assert counter and sequence
        assert (product.site, product.drive, product.sequence) == (int(counter[1]), int(counter[2]), sequence[1].upper())
    tiles = [parse(p.name) for folder in ("images", "unlabeled", "panoramas/images") for p in (shared / "data/mars" / folder).iterdir()]
    assert {(t.mission, t.camera, t.kind) for t in tiles} == {("msl", "mastcam", "image")} and all(t.sol for t in tiles)
    sample = [parse(str(p)) for p in (shared / "data/ai4mars_sample").rglob("N*") if p.parent.name != "train"]
    assert {(p.camera, p.kind) for p in sample} == {("navcam_left", "image"), ("navcam_left", "derived")}


# --- conventions, field by field --------------------------------------------------------------------------------------

NUMBER = st.integers(0, 9999)
LETTERS = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=4, max_size=4)


@settings(deadline=None)
@given(st.sampled_from(sorted(MSL_CAMERAS)), NUMBER, st.integers(0, 999), NUMBER, LETTERS, st.sampled_from("FDMBSTYN"), st.booleans())
def test_msl_names_come_back_as_they_were_made(inst: str, clock: int, site: int, drive: int, word: str, samp: str, derived: bool) -> None:
    product = "RNG" if derived else "RAD"
    name = f"{inst}B_{clock:09d}{product}_{samp}{site:03d}{drive:04d}{word}{clock:05d}M1"
    kind = "derived" if derived else {"S": "subframe", "T": "thumbnail", "Y": "thumbnail", "N": "derived"}.get(samp, "image")
    assert parse(f"x/{name}.IMG") == Product(name, "msl", MSL_CAMERAS[inst], None, site, drive, f"{word}{clock:05d}", kind)


@settings(deadline=None)
@given(NUMBER, st.sampled_from(["ML", "MR", "MH", "MD"]), st.integers(0, 99999), NUMBER, st.sampled_from("ABCDEFGHIJKLMNOPQRSTU"))
def test_mmm_names_come_back_as_they_were_made(sol: int, inst: str, sequence: int, number: int, letter: str) -> None:
    name = f"{sol:04d}{inst}{sequence:06d}{number % 1000:03d}{number % 100:02d}{number:05d}{letter}01_DRCL"
    found = parse(f"{name}.JPG")
    kind = "derived" if letter in "SU" else "thumbnail" if letter in MMM_THUMBNAILS else "image"
    assert (found.product, found.sol, found.camera, found.kind) == (name, sol, MSL_CAMERAS[inst], kind)
    assert found.sequence is not None and found.sequence.endswith(f"{sequence:05d}")


@settings(deadline=None)
@given(
    st.sampled_from(sorted(M2020_CAMERAS)), NUMBER, st.integers(0, 999), NUMBER, LETTERS, st.sampled_from("NT"), st.integers(0, 16),
    st.integers(0, 3),
)  # fmt: skip
def test_m2020_names_come_back_as_they_were_made(
    inst: str, sol: int, site: int, drive: int, word: str, samp: str, tile: int, scale: int
) -> None:
    name = f"{inst}F_{sol:04d}_{sol:010d}_{site:03d}ECM_{samp}{site:03d}{drive:04d}{word}{sol:05d}_{tile:02d}_{scale}LLJ01"
    found = parse(f"{name}.png")
    assert fields(found)[:6] == ("m2020", M2020_CAMERAS[inst], sol, site, drive, f"{word}{sol:05d}")
    assert found.product == name
    if samp == "T":
        assert found.kind == "thumbnail"
    elif M2020_CAMERAS[inst].startswith(("navcam", "hazcam", "cachecam")):
        assert found.kind == ("tile" if tile and scale < 2 else "image")


@settings(deadline=None)
@given(
    st.sampled_from("1234"),
    st.sampled_from("EFMNPR"),
    NUMBER,
    st.sampled_from(sorted(MER_IMAGES | MER_SUBFRAMES | MER_THUMBNAILS | {"XYL"})),
)
def test_mer_names_come_back_as_they_were_made(scid: str, inst: str, number: int, product: str) -> None:
    name = f"{scid}{inst}{number:09d}{product}{number % 100:02d}{number // 100:02d}P{number:04d}L0M1"
    found = parse(f"{name}-THM.JPG" if number % 2 else name)
    kinds_of = {
        **dict.fromkeys(MER_IMAGES, "image"),
        **dict.fromkeys(MER_SUBFRAMES, "subframe"),
        **dict.fromkeys(MER_THUMBNAILS, "thumbnail"),
    }
    kind = "calibration" if scid in "34" else kinds_of.get(product, "derived")
    if number % 2 and kind in ("image", "subframe"):
        kind = "thumbnail"
    assert (found.product, found.mission, found.site, found.drive) == (
        name,
        "mer1" if scid in "13" else "mer2",
        number % 100,
        number // 100,
    )
    assert (found.sequence, found.kind) == (f"P{number:04d}", kind)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_name_is_an_error(name: str) -> None:
    assert parse(name).kind in KINDS and parse(f"https://host/{name}").kind in KINDS and parse(f"zip://{name}::x.zip").kind in KINDS


@pytest.mark.parametrize(
    "name", ["holiday.jpg", "IMG_0001.JPG", "C000M5232T493378259EDR_F0000_0134M1.IMG", "XNLB_516721703EDR_F0540992CCAM15900M1", ""]
)
def test_of_other_names_nothing_is_made_up(name: str) -> None:
    assert parse(name) == Product()


def test_counters_beyond_their_digits_go_on_in_letters() -> None:
    """The first, some and the last numbers of each shape in the missions' own tables; every number has one code."""
    for code, number in {
        "999": 999,
        "A00": 1000,
        "Z99": 3599,
        "AA0": 3600,
        "ZZ9": 10359,
        "AAA": 10360,
        "ZZZ": 27935,
        "0AA": 27936,
        "7DV": 32767,
    }.items():
        assert _counter(code) == number
    for code, number in {"9999": 9999, "A000": 10000, "Z999": 35999, "AA00": 36000, "LJ35": 65535}.items():
        assert _counter(code) == number
    assert _counter("___") is None and _counter("____") is None
    figures = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert sorted(n for a in figures for b in figures if (n := _mer_counter(a + b)) is not None) == list(range(1296))
    assert [_mer_counter(c) for c in ("A0", "ZZ", "0A", "9Z", "##")] == [100, 1035, 1036, 1295, None]


def test_kinds_of_products_are_apart() -> None:
    assert not MER_IMAGES & MER_SUBFRAMES and not MER_IMAGES & MER_THUMBNAILS and not MER_SUBFRAMES & MER_THUMBNAILS
    assert not {"EDR", "ECM", "RAD", "IOF", "FDR", "EBY"} & DERIVED


# --- what folders tell ------------------------------------------------------------------------------------------------

PLAIN = "NLB_516721703EDR_F0540992CCAM15900M1.IMG"


@pytest.mark.parametrize(
    ("path", "sol"),
    [
        (f"sol/03027/x/{PLAIN}", 3027),
        (f"/data/SOL01343/{PLAIN}", 1343),
        (f"s3://b/sol_0012/{PLAIN}", 12),
        (f"zip://sol 7/{PLAIN}::/data/sol9/a.zip", 7),
        (f"http://mars.jpl.nasa.gov/msl-raw-images/msss/00003/mcam/{PLAIN}", 3),
        (f"sol0001-0100/{PLAIN}", None),
        (f"resolution/12/{PLAIN}", None),
        (f"console/12/{PLAIN}", None),
        ("sol/03027/0710MR0030170000402526E01_DRLX.IMG", 710),
        ("sol/03027/holiday.jpg", 3027),
    ],
)
def test_a_folder_tells_the_sol_where_the_name_does_not(path: str, sol: int | None) -> None:
    assert parse(path).sol == sol


@pytest.mark.parametrize(
    ("path", "root", "kind"),
    [
        (f"/arch/CALIB/{PLAIN}", "/arch", "calibration"),
        (f"/arch/EXTRAS/THUMBNAIL/{PLAIN}", "/arch", "thumbnail"),
        (f"/arch/calibrated/{PLAIN}", "/arch", "image"),
        (f"/calibration/run/{PLAIN}", "/calibration/run", "image"),
        (f"/calibration/run/thumbs/{PLAIN}", "/calibration/run", "thumbnail"),
        (f"zip://calib/{PLAIN}::/calib/a.zip", "zip://", "calibration"),
        ("CAL_ML0030170000402526E01_DRLX.IMG", "", "calibration"),
        ("NLF_D100_0673158398_650ECM_N0060000NCAM00900_01_295J01.png", "", "calibration"),
        ("/arch/calib/NLA_397586928RNG_F0010008AUT_04096M1.png", "/arch", "derived"),
    ],
)
def test_what_is_no_picture_of_mars_is_told_apart(path: str, root: str, kind: str) -> None:
    assert parse(path, root).kind == kind


# --- filters ----------------------------------------------------------------------------------------------------------

NAVCAM = parse("sol/00100/NLB_516721703EDR_F0540992NCAM15900M1.IMG")


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        (Filters(), None),
        (Filters(missions=("MSL",)), None),
        (Filters(missions=("mer*", "m2020")), "mission"),
        (Filters(cameras=("navcam",)), None),
        (Filters(cameras=("*_left",)), None),
        (Filters(cameras=("nav",)), "camera"),
        (Filters(cameras=("navcam_right", "mahli")), "camera"),
        (Filters(sols=(Range(None, 100),)), None),
        (Filters(sols=(Range(101, None), Range(3, 3))), "sol"),
        (Filters(sites=(Range(54, 54),), drives=(Range(900, 1000),)), None),
        (Filters(drives=(Range(993, None),)), "drive"),
        (Filters(sites=(Range(None, 53),)), "site"),
        (Filters(sequences=("ncam*",)), None),
        (Filters(sequences=("CCAM*",)), "sequence"),
        (Filters(kinds=frozenset({"thumbnail"})), "image"),
    ],
)
def test_a_filter_names_itself_where_it_leaves_out(filters: Filters, reason: str | None) -> None:
    assert filters.against(NAVCAM) == reason


@pytest.mark.parametrize("field", ["missions", "cameras", "sequences", "sols", "sites", "drives"])
def test_what_a_name_does_not_tell_fits_no_filter(field: str) -> None:
    wanted = ("*",) if field in ("missions", "cameras", "sequences") else (Range(),)
    assert Filters(**{field: wanted}).against(Product()) == field.removesuffix("s")


def test_sizes_are_bounds_and_an_unknown_one_is_outside() -> None:
    small = Filters(size_bytes=Range(10, 20))
    assert [small.against_size(n) for n in (9, 10, 20, 21, None)] == ["size", None, None, "size", "size"]
    assert Filters().against_size(None) is None


def test_ranges_sizes_and_kinds_are_read_as_people_write_them() -> None:
    assert ranges(["100", "5-7, 9-", "-3"], "--sol") == (Range(100, 100), Range(5, 7), Range(9, None), Range(None, 3))
    assert [size(t, "--min-size") for t in ("0", "10k", "2M", "1GB", None)] == [0, 10_000, 2_000_000, 10**9, None]
    assert kinds(["thumbnails,calibration", "subframe"], []) == TAKEN | {"thumbnail", "calibration", "subframe"}
    assert kinds([], ["tiles"]) == {"image"}


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: ranges(["7-5"], "--sol"), "--sol '7-5': the range ends before it begins; write 5-7"),
        (lambda: ranges(["ten"], "--site"), "--site 'ten' is no range"),
        (lambda: ranges(["-"], "--site"), "is no range"),
        (lambda: size("ten", "--min-size"), "--min-size 'ten' is no size"),
        (lambda: kinds(["selfies"], []), "--with 'selfie' is no kind of product; there are image, tile"),
    ],
)
def test_what_can_t_be_read_says_how_to_write_it(read: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        read()
