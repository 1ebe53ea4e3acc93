"""What each synthetic scene is to show: its kind, how much of each class, and the site whose geology, colours and camera it shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raysal.datasets.synthetic_light import Camera, Weather
from raysal.datasets.synthetic_terrain import F32, HOLE, ROCK, SOIL, TRACE, Geology

SITE_BLOCK = 12
"""Indices are cut into blocks of this length, and each block at a seeded place into two sites."""
_KINDS = {"hole": 0.04, "trace": 0.05, "rover": 0.05, "vista_sky": 0.18, "vista_ridge": 0.095, "ground": 0.585}
"""Share of the scenes by kind; a rover's scene becomes one of "vista_sky" or "ground"."""
_SKY_WITHOUT_RIDGE = 0.12  # of the scenes with sky
_SOIL, _SAND, _ROCK, _NO_BEDROCK, _ROVER_ON_SKYLINE = 0.58, 0.16, 0.56, 0.06, 0.25  # shares of the scenes
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
    cut = 4 + stream(seed, 9, block).integers(5)
    return int(2 * block + (place >= cut))


def plan_of(seed: int, index: int) -> Plan:
    """What a scene is to show, before a pixel is drawn.

    Draws follow Kronecker sequences, frac(offset + index * irrational): any run of indices holds each kind of content in nearly
    its exact share, so that small pools do not miss a rare class by bad luck of the seed.
    """
    draw = [float((offset + index * alpha) % 1) for offset, alpha in zip(_offsets(seed), _ALPHAS, strict=True)]
    ends = np.cumsum(list(_KINDS.values()))
    number = min(int(np.searchsorted(ends, draw[0], side="right")), len(ends) - 1)
    kind, share = list(_KINDS.items())[number]
    within = 1 - (float(ends[number]) - draw[0]) / share
    amount = stream(seed, 6, index).beta((2.0, 2.5, 1.4), (5.4, 2.3, 3.0))
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


def aim(plan: Plan, rng: np.random.Generator) -> tuple[float, float | None]:
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


@lru_cache(maxsize=64)
def site_of(seed: int, group: int) -> Site:
    """Geology, weather, camera and colours of a site, as `group_of` numbers them."""
    rng = stream(seed, 1, group)
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
        sky=_tone(rng, (0.76, 0.635, 0.50), 0.09),
        horizon=_tone(rng, (0.84, 0.71, 0.56), 0.07),
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


def stream(seed: int, purpose: int, index: int) -> np.random.Generator:
    """A generator for one purpose of one scene or site; independent of every other."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, purpose, index))))


@lru_cache(maxsize=8)
def _offsets(seed: int) -> tuple[float, ...]:
    return tuple(stream(seed, 7, 0).uniform(size=len(_ALPHAS)).tolist())
