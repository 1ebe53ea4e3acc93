"""What a name tells of an image: mission, camera, sol, site, drive, sequence, and what kind of product it is.

One table of conventions, each a pattern and a few lines that read it. A name that fits none is an image of which nothing is
known; nothing here ever fails. Where each rule comes from, and how sure it is: docs/archives.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

KINDS = ("image", "tile", "subframe", "thumbnail", "calibration", "derived")
"""``tile`` is a piece of one exposure that came down in pieces, ``derived`` what is no picture (range maps, masks, histograms)."""


@dataclass(frozen=True, slots=True)
class Product:
    """What a name tells; None where it does not.

    Attributes:
        product: The product's own name, without folder, suffix and what somebody added to it.
        mission: msl, m2020, mer1 (Opportunity) or mer2 (Spirit).
        camera: From the general to the particular, for example navcam_left, hazcam_front_right, sherloc_watson.
        sol: Martian day of the mission. The spacecraft clock in a name is not turned into a sol: folders often tell it.
        site: Site counter of the rover's localisation.
        drive: Drive counter, or position, within the site.
        sequence: Of commands, upper case, for example NCAM00253.
        kind: One of KINDS.
    """

    product: str | None = None
    mission: str | None = None
    camera: str | None = None
    sol: int | None = None
    site: int | None = None
    drive: int | None = None
    sequence: str | None = None
    kind: str = "image"


NOTHING = Product()

MSL_CAMERAS = {
    "FL": "hazcam_front_left", "FR": "hazcam_front_right", "RL": "hazcam_rear_left", "RR": "hazcam_rear_right",
    "NL": "navcam_left", "NR": "navcam_right", "ML": "mastcam_left", "MR": "mastcam_right",
    "MH": "mahli", "MD": "mardi", "CR": "chemcam_rmi", "CC": "chemcam",
}  # fmt: skip
MSL_STEREO = {"F": "hazcam_front", "R": "hazcam_rear", "N": "navcam", "M": "mastcam", "H": "mahli"}
MSL_SEQUENCES = {"ML": "MCAM", "MR": "MCAM", "MH": "MHLI", "MD": "MRDI"}
M2020_CAMERAS = {
    "FL": "hazcam_front_left", "FR": "hazcam_front_right", "BL": "hazcam_front_left", "BR": "hazcam_front_right",
    "RL": "hazcam_rear_left", "RR": "hazcam_rear_right", "NL": "navcam_left", "NR": "navcam_right",
    "ZL": "mastcamz_left", "ZR": "mastcamz_right", "CC": "cachecam", "LR": "supercam_rmi", "PC": "pixl_mcc",
    "SC": "sherloc_aci", "SE": "sherloc_engineering", "SI": "sherloc_watson", "SL": "sherloc_watson", "SR": "sherloc_watson",
    "HN": "helicopter_navigation", "HS": "helicopter_color", "WS": "meda_skycam",
    "EA": "edl_parachute_a", "EB": "edl_parachute_b", "EC": "edl_parachute_c", "ED": "edl_rover_down", "EU": "edl_rover_up",
    "ES": "edl_descent_stage", "EL": "edl_lander_vision",
}  # fmt: skip
M2020_STEREO = {
    "F": "hazcam_front", "B": "hazcam_front", "R": "hazcam_rear", "N": "navcam", "Z": "mastcamz", "S": "sherloc_watson"
}  # fmt: skip
MER_CAMERAS = {
    "F": "hazcam_front", "R": "hazcam_rear", "N": "navcam", "P": "pancam", "M": "microscopic_imager", "E": "descent_imager"
}  # fmt: skip
TILED = frozenset({"FL", "FR", "BL", "BR", "RL", "RR", "NL", "NR", "CC"})
"""Mars 2020 cameras of 5120 x 3840 pixels, whose finer images come down in tiles of 1280 x 960."""


def _codes(text: str) -> frozenset[str]:
    return frozenset(text.split())


DERIVED = _codes(
    "EDM ERP ERS ECS EHG EAU FAU DDD DDL DDS DSE DSL DSS DSP DSR MDS DFF DFL DFS XYZ XYM XYR XRM ZRM XYE MXY XYF XYO XRZ XRR XXX YYY ZZZ "
    "DEM XOZ XXF YYF ZZF ZIH RNE RNF RNG RNM RNR RNO UVF UVO UVP UVS UVT UVW UUU VVV WWW UUF VVF WWF UIH TFH SEN SHD SHO SLO SLP SMG "
    "SMO SNO SNT SRD ARK ARM ARO MAR RUF RUS RUC RUH GUN GUA GUC GRN GRA GRC GSR GUH SLH MSK TEN TER IEF IEP IDM IDX ICM"
)
"""Products of MSL and Mars 2020 that are no pictures; every other product type is one."""

MER_IMAGES = _codes("EFF EDN ILF FFL INN DNL RAD RAL MRD MRL RFD RFL IOF IOL IFF IFL IFS CCD CCL CFD CFL")
MER_SUBFRAMES = _codes("ESF ISF SFL")
MER_THUMBNAILS = _codes("ETH ITH THN RAT RAN MRT MRN RFT RFN IOT ION IFT IFN CCT CCN CFT CFN")
"""Of MER's product types; every other one is no picture."""

MMM_THUMBNAILS = frozenset("GHIOPQTU")
MMM_RANGE_MAPS = frozenset("SU")

COPIES = re.compile(r"-THM|_(?:320|800)(?![0-9A-Z])")
"""Small copies on the public raw-image sites, after the product's name; their larger ones (-BR, _1200) count as images."""

COUNTER_STARTS = {"LDD": 1000, "LLD": 3600, "LLL": 10360, "DLL": 27936, "LDDD": 10000, "LLDD": 36000}
"""First number of each shape of a Mars 2020 counter, L a letter and D a digit."""


def _whole(body: str) -> re.Pattern[str]:
    """A product's name between other characters, perhaps right after SOL01343 as some data sets write it."""
    return re.compile(rf"(?:^|[^0-9A-Z]|SOL(?P<folder_sol>\d{{1,5}}))(?P<id>{body})(?![0-9A-Z])", re.ASCII)


def _msl(m: re.Match[str]) -> Product:
    inst, sample = m["inst"], m["samp"]
    camera = MSL_CAMERAS.get(inst) or MSL_STEREO.get(inst[0])
    if m["prod"] in DERIVED or sample == "N" or (inst not in MSL_CAMERAS and inst[1] in "AGS"):
        kind = "derived"
    else:
        kind = {"T": "thumbnail", "Y": "thumbnail", "S": "subframe"}.get(sample, "image")
    return Product(m["id"], "msl", camera, None, _decimal(m["site"]), _decimal(m["drive"]), m["seq"], kind)


def _msl_mmm(m: re.Match[str]) -> Product:
    if not m["sol"].isdigit():  # CAL_, CRU_, ATL_ ...: before Mars
        kind = "calibration"
    elif m["type"] in MMM_RANGE_MAPS:
        kind = "derived"
    else:
        kind = "thumbnail" if m["type"] in MMM_THUMBNAILS else "image"
    sequence = f"{MSL_SEQUENCES[m['inst']]}{int(m['seq']):05d}"
    return Product(m["id"], "msl", MSL_CAMERAS[m["inst"]], _decimal(m["sol"]), None, None, sequence, kind)


def _m2020(m: re.Match[str]) -> Product:
    inst = m["inst"]
    camera = M2020_CAMERAS.get(inst) or M2020_STEREO.get(inst[0])
    if not m["sol"].isdigit():  # a test on Earth: year and day in place of the sol
        kind = "calibration"
    elif m["prod"] in DERIVED or (inst not in M2020_CAMERAS and inst[1] in "AG"):
        kind = "derived"
    elif m["samp"] == "T":
        kind = "thumbnail"
    else:
        kind = "tile" if inst in TILED and m["tile"] not in (None, "00") and m["scale"] in "01" else "image"
    site, drive = _counter(m["site"]), _counter(m["drive"])
    return Product(m["id"], "m2020", camera, _decimal(m["sol"]), site, drive, m["seq"], kind)


def _mer(m: re.Match[str]) -> Product:
    eye = {"L": "_left", "R": "_right"}.get(m["eye"], "") if m["inst"] in "FRNP" else ""
    if m["scid"] in "34":  # the rovers on the test bed
        kind = "calibration"
    elif m["prod"] in MER_IMAGES:
        kind = "image"
    else:
        kind = "subframe" if m["prod"] in MER_SUBFRAMES else "thumbnail" if m["prod"] in MER_THUMBNAILS else "derived"
    mission = "mer1" if m["scid"] in "13" else "mer2"
    return Product(m["id"], mission, MER_CAMERAS[m["inst"]] + eye, None, _mer_counter(m["site"]), _mer_counter(m["drive"]), m["seq"], kind)


def _marsscapes(m: re.Match[str]) -> Product:
    return Product(m["id"].lower(), "msl", "mastcam", int(m["sol"]))


CONVENTIONS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Product]], ...] = (
    # Curiosity, all cameras as JPL names them: NLB_516721703EDR_F0540992CCAM15900M1
    (
        _whole(
            r"(?P<inst>[A-Z]{2})[0-9A-Z][0-9A-Z_]\d{9}(?P<prod>[A-Z]{3})[A-Z_](?P<samp>[A-Z])"
            r"(?P<site>[0-9A-Z_]{3})(?P<drive>[0-9A-Z_]{4})(?P<seq>[A-Z][0-9A-Z_]{8})[A-Z_][0-9A-Z_]"
        ),
        _msl,
    ),
    # Curiosity, Mastcam, MAHLI and MARDI as MSSS names them: 0710MR0030170000402526E01_DRLX
    (
        _whole(r"(?P<sol>\d{4}|[A-Z]{3}_)(?P<inst>M[DHLR])(?P<seq>\d{6})\d{3}\d{2}\d{5}(?P<type>[A-U])[0-9A-F][0-9A-Z_](?:_[A-Z]{4})?"),
        _msl_mmm,
    ),
    # The same in the first weeks' raw images, sequence, line and counter shorter: 0003ML0000012000E1_DXXX
    (_whole(r"(?P<sol>\d{4})(?P<inst>M[DHLR])(?P<seq>\d{4})\d{3}\d{3}(?P<type>[A-U])[0-9A-F](?:_[A-Z]{4})?"), _msl_mmm),
    # Perseverance and Ingenuity: NLF_0100_0673158398_650ECM_N0060000NCAM00900_01_295J01
    (
        _whole(
            r"(?P<inst>[A-Z]{2})[0-9A-Z_]{2}(?P<sol>\d{4}|[A-Z]\d{3})[A-Z_]\d{10}_\d{3}(?P<prod>[A-Z]{3})[A-Z_](?P<samp>[NT])"
            r"(?P<site>[0-9A-Z_]{3})(?P<drive>[0-9A-Z_]{4})(?P<seq>[A-Z][0-9A-Z_]{8})(?:_(?P<tile>\d\d)_|[0-9A-Z_]{4})"
            r"(?P<scale>[0-9A-Z_])[0-9A-Z]{2}[A-Z_](?:[0-9A-Z_]{2})?"
        ),
        _m2020,
    ),
    # Spirit and Opportunity: 2N127168412EFF0211P1515L0M1
    (
        _whole(
            r"(?P<scid>[1-4])(?P<inst>[EFMNPR])\d{9}(?P<prod>[A-Z]{3})(?P<site>[0-9A-Z]{2}|\#\#)(?P<drive>[0-9A-Z]{2}|\#\#)"
            r"(?P<seq>[A-Z]\d{4})(?P<eye>[A-Z])\d[A-Z][0-9A-Z_]"
        ),
        _mer,
    ),
    # MarsScapes panoramas and their tiles: sol0122_1, sol0122_1_r0c00
    (re.compile(r"^(?P<id>SOL(?P<sol>\d{4})_\d+(?:_R\d+C\d+)?)(?=$|\.)", re.ASCII), _marsscapes),
)

SOL_FOLDERS = re.compile(r"/(?:sol[ _-]?|sol/|msss/|gallery/all/[12]/[a-z]/)(\d{1,5})(?=/)", re.ASCII | re.IGNORECASE)
"""Folders that tell a sol: sol/03027, SOL01343, and the public sites' own."""
FOLDER_KINDS = {
    "calib": "calibration", "calibration": "calibration",
    "thumbnail": "thumbnail", "thumbnails": "thumbnail", "thumbs": "thumbnail",
}  # fmt: skip
"""What lies in such a folder of an archive is of this kind, whatever its name."""


def parse(name: str, root: str = "") -> Product:
    """Reads a name.

    Args:
        name: A file's name, its path, or its URI, with or without suffix, query, an index at its end; any case.
        root: What the name begins with that is not the archive's own: folders in it may tell a sol, but no kind.
    """
    path, query = _path_of(name)
    folder, _, base = path.rpartition("/")
    found = _match(base) or (_match(query.rpartition("/")[2]) if query else None) or NOTHING
    if found.sol is None and (sols := SOL_FOLDERS.findall(f"/{folder}/")):
        found = replace(found, sol=int(sols[-1]))
    own = name[len(root) :] if root and name.startswith(root) else name
    for part in own.split("::", 1)[0].lower().split("/")[:-1]:
        if part in FOLDER_KINDS and found.kind != "derived":
            found = replace(found, kind=FOLDER_KINDS[part])
    return found


def _match(base: str) -> Product | None:
    text = base.upper()
    for pattern, read in CONVENTIONS:
        if m := pattern.search(text):
            found = read(m)
            if found.kind in ("image", "tile", "subframe") and COPIES.match(text, m.end()):
                found = replace(found, kind="thumbnail")
            if found.sol is None and m.groupdict().get("folder_sol"):
                found = replace(found, sol=int(m["folder_sol"]))
            return found
    return None


def _path_of(name: str) -> tuple[str, str]:
    """Path and query of a name; percent signs stand for other characters in web addresses only."""
    inner = name.split("::", 1)[0]
    if inner[:7].lower() == "http://" or inner[:8].lower() == "https://":
        try:
            parts = urlsplit(inner)
        except ValueError:  # no host that can be; what follows it may still be a name
            path, _, query = inner.partition("?")
            return unquote(path), unquote(query)
        return unquote(parts.path), unquote(parts.query)
    return inner, ""


def _decimal(code: str) -> int | None:
    return int(code) if code.isascii() and code.isdigit() else None


def _counter(code: str) -> int | None:
    """Site (3 characters) or drive (4) of a Mars 2020 name: decimal as far as that goes, then with letters."""
    if code.isdigit():
        return int(code)
    start = COUNTER_STARTS.get("".join("D" if c.isdigit() else "L" for c in code))
    if start is None or "_" in code:  # underscores: out of range
        return None
    value = 0
    for c in code:
        value = value * 10 + int(c) if c.isdigit() else value * 26 + ord(c) - ord("A")
    return start + value


def _mer_counter(code: str) -> int | None:
    """Site or drive of a MER name: 00 to 99, A0 to ZZ for 100 to 1035, 0A to 9Z for 1036 to 1295, ## beyond."""
    if code.isdigit():
        return int(code)
    if code[0].isalpha():
        return 100 + 36 * (ord(code[0]) - ord("A")) + int(code[1], 36)
    return 1036 + 26 * int(code[0]) + ord(code[1]) - ord("A") if code[1].isalpha() else None
