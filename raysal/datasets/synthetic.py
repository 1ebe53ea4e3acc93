"""Synthetic Mars scenes with exact masks of the nine S5Mars classes, for demos, tests and benchmarks without any download.

A scene is a function of (seed, index, size) alone. Neighbouring indices form sites: groups of 4 to 8 scenes that share geology,
colours, weather and camera, so that a pool is redundant as a rover's archive is. Classes have about S5Mars' shares of pixels
(method of counting: all pixels of the scenes) and of images; rover, trace and hole come in 5, 5 and 4 % of the images (S5Mars: 2.7,
1.9, 0.9 %) and are smaller in turn, so that a pool of 400 holds about 20, 20 and 16 of them.

Soil, sand and bedrock take their colours from one range over all sites: what tells them apart is texture and form.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from raysal.archive.uris import exists, join, list_names, open_fs, read_bytes, write_bytes
from raysal.datasets.synthetic_light import Camera, Weather, backdrop, expose
from raysal.datasets.synthetic_terrain import F32, HOLE, ROCK, SOIL, TRACE, Geology, Grid, Ground, lay, project, sunlight
from raysal.datasets.synthetic_things import add_holes, add_rocks, add_rover, add_tracks
from raysal.errors import DataError
from raysal.images.masks import encode_mask
from raysal.labels import S5MARS

VERSION = 1
"""Of the generator: another number means other pixels for the same seed."""
VAL_START = 1_000_000
"""Validation scenes are numbered from here: other sites than the pool's, and the same ones whatever the pool's size."""
SITE_BLOCK = 12
"""Indices are cut into blocks of this length, and each block at a seeded place into two sites."""
WORKERS = 4

_KINDS = {"hole": 0.04, "trace": 0.05, "rover": 0.05, "vista_sky": 0.18, "vista_ridge": 0.095, "ground": 0.585}
_SKY_WITHOUT_RIDGE = 0.12  # of the scenes with sky
_SOIL, _SAND, _ROCK, _NO_BEDROCK, _ROVER_ON_SKYLINE = 0.58, 0.16, 0.56, 0.06, 0.25
_ALPHAS = tuple(float(a % 1) for a in (np.sqrt(1.25) + 0.5, *np.sqrt((2, 3, 7, 11, 13))))


@dataclass(frozen=True)
class Plan:
    """What one scene shows. Shares are of the ground; `within` in 0..1 says how far into its kind's range the scene lies."""

    kind: str
    within: float
    rover: bool
    soil: float
    sand: float
    rock: float
    bedrock: bool


@dataclass(frozen=True)
class Site:
    """What the scenes of one group share."""

    geology: Geology
    weather: Weather
    camera: Camera
    focal: float
    colors: np.ndarray  # float32 [9, 3]
    dust: np.ndarray  # float32 [3]


def group_of(seed: int, index: int) -> int:
    """The site of a scene: consecutive indices, 4 to 8 a site."""
    block, place = divmod(index, SITE_BLOCK)
    cut = 4 + _rng(seed, 9, block).integers(5)
    return int(2 * block + (place >= cut))


def scene(seed: int, index: int, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene; the same bytes on every call, in any order, in any process. Other sizes show the same place.

    Args:
        seed: Which planet; 0 or more.
        index: Which scene; 0 or more.
        size_px: Height and width, from 32.

    Returns:
        uint8 [H, W, 3] RGB, and uint8 [H, W] class ids 0..8 of `raysal.labels.S5MARS`. Every pixel has a class.

    Raises:
        DataError: A negative seed or index, or a size under 32.
    """
    if seed < 0 or index < 0 or size_px < 32:
        raise DataError(f"synthetic scene (seed {seed}, index {index}, {size_px} px): seed and index start at 0, sizes at 32 px")
    plan, here, rng = plan_of(seed, index), _site(seed, group_of(seed, index)), _rng(seed, 0, index)
    turned = replace(here.weather, azimuth=here.weather.azimuth + rng.uniform(-np.pi, np.pi))
    horizon, crest = _aim(plan, rng)
    focal = here.focal * (2.2 if plan.kind.startswith("vista") else 1.0)
    geology = replace(here.geology, relief=here.geology.relief * min(1.0, 1.2 * (1 - horizon)))
    grid = Grid(size_px, horizon, focal, rng.uniform(0, 512, (48, 2)))
    ground = lay(grid, geology, plan.soil, plan.sand, plan.bedrock)
    if plan.kind == "trace":
        add_tracks(grid, ground, rng)
    if plan.kind == "hole":
        add_holes(grid, ground, rng)
    if plan.rock > 0:
        add_rocks(grid, ground, _rng(seed, 2, index), plan.rock)
    light = sunlight(grid, ground.height, turned.azimuth, turned.elevation, turned.ambient) * ground.albedo
    pixel, seen = project(grid, ground.height)
    picture, mask = _colored(pixel, light, ground, grid, (here.colors, here.dust), turned)
    if not seen.all():
        behind = backdrop(size_px, turned, crest, max(horizon, 0.02), here.colors[1], _rng(seed, 3, index))
        np.copyto(picture, behind[0], where=~seen[..., None])
        np.copyto(mask, behind[1], where=~seen)
    if plan.rover:
        add_rover(picture, mask, _rng(seed, 4, index), tuple(here.dust), 0.75 + 0.35 * here.weather.ambient)
    jitter = replace(here.camera, exposure=here.camera.exposure * rng.uniform(0.9, 1.1), blur=here.camera.blur * size_px / 256 + 0.3)
    return expose(picture, jitter, _rng(seed, 5, index)), mask


def plan_of(seed: int, index: int) -> Plan:
    """What a scene is to show, before a pixel is drawn.

    Draws follow Kronecker sequences, frac(offset + index * irrational): any run of indices holds each kind of content in nearly
    its exact share, so that small pools do not miss a rare class by bad luck of the seed.
    """
    draw = [float((offset + index * alpha) % 1) for offset, alpha in zip(_rng_offsets(seed), _ALPHAS, strict=True)]
    place, within, kind = draw[0], 0.0, ""
    for kind, share in _KINDS.items():
        if place < share:
            within = place / share
            break
        place -= share
    amount = _rng(seed, 6, index).beta((2.0, 2.5, 1.4), (5.4, 2.3, 3.0))
    soil = amount[0] if draw[2] < _SOIL else 0.0
    sand = amount[1] if draw[3] < _SAND else 0.0
    rock = 0.02 + 0.42 * amount[2] ** 1.8 if draw[4] < _ROCK else 0.0
    bedrock = draw[5] >= _NO_BEDROCK
    if kind == "trace":  # wheels mark loose ground
        soil, sand = (max(soil, 0.55), sand) if draw[3] >= _SAND else (soil, max(sand, 0.6))
    if kind == "hole":  # drills bite bedrock
        soil, sand, bedrock = soil * 0.4, 0.0, True
    rover = kind == "rover"
    if rover:
        kind = "vista_sky" if draw[1] < _ROVER_ON_SKYLINE else "ground"
    return Plan(kind, within, rover, float(soil * (1 - sand)), float(sand), float(rock), bedrock)


def _aim(plan: Plan, rng: np.random.Generator) -> tuple[float, float | None]:
    """Rows, as shares of the height, of the flat ground's horizon and of the ridge's crest (None: no ridge)."""
    t, other = plan.within, float(rng.uniform())
    if plan.kind == "vista_sky":
        if other < _SKY_WITHOUT_RIDGE:
            return 0.35 + 0.55 * t, None
        foot = 0.97 - 0.5 * other**3
        return foot, max(foot * (1 - (0.12 + 0.72 * t) / 0.72), 0.02)
    if plan.kind == "vista_ridge":
        return 0.97 - 0.22 * t, -1.0
    if plan.kind == "hole":
        return -1.0 - 1.5 * t, None
    if plan.kind == "trace":
        return -0.08 - 0.5 * t, None
    return -0.06 - 1.8 * t * t, None


def _colored(
    pixel_HW: np.ndarray, light_RU: np.ndarray, ground: Ground, grid: Grid, colors: tuple[np.ndarray, np.ndarray], weather: Weather
) -> tuple[np.ndarray, np.ndarray]:
    """The ground in colour, float32 [H, W, 3], with haze, and its classes, uint8 [H, W]."""
    mask = ground.kind.take(pixel_HW)
    picture = colors[0].take(mask, axis=0)
    picture += (colors[1] - picture) * (ground.dust.take(pixel_HW)[..., None] * F32(0.75))
    picture *= _faces(pixel_HW, light_RU.take(pixel_HW), grid)[..., None]
    veil_R = (1 - np.exp(-0.012 * (0.3 + weather.haze) * (grid.s_R - 1))).astype(F32)
    picture += (weather.horizon - picture) * veil_R.take(pixel_HW // grid.size_px)[..., None]
    return picture, mask


def _faces(pixel_HW: np.ndarray, light_HW: np.ndarray, grid: Grid) -> np.ndarray:
    """Lays thin beds on steep faces, where many pixels of a column see one ground sample; in place, and returned."""
    row_HW = pixel_HW // grid.size_px
    where = np.zeros(row_HW.shape, bool)
    where[1:-2] = (row_HW[:-3] == row_HW[2:-1]) & (row_HW[1:-2] == row_HW[3:])
    reach = max(1, grid.size_px // 160)
    even = sum(np.roll(light_HW, k * reach, axis=1) for k in (-2, -1, 0, 1, 2)) / F32(5)
    y, _ = np.nonzero(where)
    row = row_HW[where]
    height = (grid.r_R[row] - (y + 0.5) / grid.size_px) * grid.s_R[row]
    light_HW[where] = even[where] * (1.0 + 0.12 * np.sin(height * 700) + 0.1 * np.sin(height * 290 + 1)).astype(F32)
    return light_HW


@lru_cache(maxsize=64)
def _site(seed: int, group: int) -> Site:
    """Geology, colours, weather and camera of a site."""
    rng = _rng(seed, 1, group)
    slab = rng.uniform(0.14, 0.55)
    geology = Geology(
        relief=rng.uniform(0.01, 0.05),
        slab=slab,
        turn=rng.uniform(-0.7, 0.7) if rng.uniform() < 0.75 else rng.uniform(0, np.pi),
        thickness=slab * rng.uniform(0.035, 0.10),
        ledges=float(rng.choice((0.0, rng.uniform(0.2, 0.8), 1.0))),
        patchiness=rng.uniform(0, 1),
        pebbles=rng.uniform(0, 1),
        ripple=rng.uniform(0.035, 0.11),
        roughness=rng.uniform(0.4, 1.3),
    )
    dust = np.array((0.66, 0.505, 0.36)) * rng.uniform(0.75, 1.15) * (1 + rng.uniform(-0.05, 0.05, 3) * (1, 0.5, 1))
    weather = Weather(
        azimuth=0.0,
        elevation=np.radians(rng.uniform(18, 68)),
        ambient=rng.uniform(0.3, 0.55),
        haze=float(rng.beta(1.3, 3)),
        sky=_tone(rng, (0.73, 0.63, 0.49), 0.10),
        horizon=_tone(rng, (0.82, 0.71, 0.55), 0.08),
    )
    gray = bool(rng.uniform() < 0.18)
    raw = rng.uniform() < 0.25
    camera = Camera(
        gray=gray,
        balance=np.array((0.975, 0.985, 0.93) if raw else (1.0, 0.99, 0.97), F32) * rng.uniform(0.98, 1.02, 3).astype(F32),
        exposure=rng.uniform(0.85, 1.15),
        contrast=rng.uniform(0.85, 1.2),
        vignette=rng.uniform(0.25, 0.6) if gray else rng.uniform(0, 0.25),
        blur=rng.uniform(0.0, 0.8),
        noise=rng.uniform(0.003, 0.013),
    )
    focal = rng.uniform(1.1, 1.4) if gray else rng.uniform(1.3, 3.0)
    return Site(geology, weather, camera, focal, _colors(rng, dust), dust.astype(F32))


def _tone(rng: np.random.Generator, rgb: tuple[float, float, float], spread: float) -> np.ndarray:
    return (np.array(rgb) * rng.uniform(1 - spread, 1 + spread) * (1 + rng.uniform(-0.4, 0.4, 3) * (1, 0.5, 1) * spread)).astype(F32)


def _colors(rng: np.random.Generator, dust: np.ndarray) -> np.ndarray:
    """One colour a class, float32 [9, 3]: between dust, basalt and pale mudstone, the same range for soil, sand and bedrock."""
    basalt, pale = np.array((0.40, 0.375, 0.325)), np.array((0.80, 0.67, 0.50))
    table = np.zeros((9, 3))
    for kind in range(9):
        dark, light = rng.uniform(0, 0.6), rng.uniform(0, 0.6)
        if kind == ROCK:
            dark = 0.3 + dark
        mixed = dust + (basalt - dust) * dark
        table[kind] = (mixed + (pale - mixed) * light * rng.uniform(0, 1)) * rng.uniform(0.86, 1.1)
    table[HOLE] = 0.5 * dust + 0.5 * np.array((0.62, 0.58, 0.54))
    table[TRACE] = table[SOIL]
    return table.astype(F32)


def _rng(seed: int, stream: int, index: int) -> np.random.Generator:
    """A generator for one purpose of one scene or site; independent of every other."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, index))))


@lru_cache(maxsize=8)
def _rng_offsets(seed: int) -> tuple[float, ...]:
    return tuple(_rng(seed, 7, 0).uniform(size=len(_ALPHAS)).tolist())


def write_archive(
    out_uri: str, images: int, val_images: int, size_px: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes scenes as a labelled folder: images/*.jpg, masks/*.png (S5Mars values 1..9), classes.json, splits.json, groups.csv.

    Safe to stop and to repeat: files that are there and whole are kept, splits.json comes last, equal arguments give equal bytes.
    A second call with more images adds to the archive; validation scenes stay the same.

    Args:
        out_uri: Folder, any fsspec URI.
        images: Scenes of split "train".
        val_images: Scenes of split "val", from other sites.
        size_px: Height and width.
        seed: Which planet.
        progress: Called with (scenes done, scenes in all) after each.

    Raises:
        DataError: The folder holds scenes of another seed, size or generator version.
        InputError: The disk is full, or the URI's driver is missing.
    """
    _claim(out_uri, {"generator": "raysal synthetic scenes", "version": VERSION, "seed": seed, "size_px": size_px})
    splits = {"train": list(range(images)), "val": list(range(VAL_START, VAL_START + val_images))}
    indices = [index for split in splits.values() for index in split]
    present = {kind: set(list_names(join(out_uri, kind))) for kind in ("images", "masks")}
    with ThreadPoolExecutor(WORKERS) as pool:  # numpy and pillow leave the interpreter lock while they work
        for done, _ in enumerate(pool.map(lambda index: _write_scene(out_uri, seed, index, size_px, present), indices), 1):
            if progress:
                progress(done, len(indices))
    rows = "".join(f"{_name(index)},site_{group_of(seed, index):06d}\n" for index in indices)
    write_bytes(join(out_uri, "groups.csv"), f"name,group\n{rows}".encode())
    write_bytes(join(out_uri, "classes.json"), _json(S5MARS.to_dict()))
    write_bytes(join(out_uri, "splits.json"), _json({split: [_name(index) for index in own] for split, own in splits.items()}))


def _claim(out_uri: str, ours: dict[str, object]) -> None:
    """Marks the folder as an archive of these scenes, or refuses it where it holds others."""
    uri = join(out_uri, "synthetic.json")
    if exists(uri):
        try:
            theirs = json.loads(read_bytes(uri))
        except ValueError:
            theirs = None
        if theirs != ours:
            raise DataError(f"{out_uri}: holds synthetic scenes made with {theirs}, asked for {ours}; name another folder or remove this one")
    else:
        write_bytes(uri, _json(ours))


def _write_scene(out_uri: str, seed: int, index: int, size_px: int, present: dict[str, set[str]]) -> None:
    image_uri, mask_uri = join(out_uri, "images", f"{_name(index)}.jpg"), join(out_uri, "masks", f"{_name(index)}.png")
    kept = f"{_name(index)}.jpg" in present["images"] and f"{_name(index)}.png" in present["masks"]
    if kept and _ends(image_uri, b"\xff\xd9") and _ends(mask_uri, b"IEND\xaeB`\x82"):
        return
    image_HWC, mask_HW = scene(seed, index, size_px)
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=90)
    write_bytes(image_uri, file.getvalue())
    write_bytes(mask_uri, encode_mask(S5MARS.file_values()[mask_HW]))


def _ends(uri: str, tail: bytes) -> bool:
    """Whether a file that is there ends as a whole one does."""
    fs, path = open_fs(uri)
    return bool(fs.size(path) > len(tail)) and fs.cat_file(path, start=-len(tail)) == tail


def _name(index: int) -> str:
    return f"val_{index - VAL_START:06d}" if index >= VAL_START else f"scene_{index:06d}"


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
