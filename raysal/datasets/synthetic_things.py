"""What stands, lies or was left on the synthetic ground: rocks, wheel tracks, drill holes, and the rover itself."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from raysal.datasets.synthetic_terrain import F32, HOLE, ROCK, ROVER, SOIL, TRACE, Grid, Ground, smoothstep

Point = tuple[float, float]


def add_rocks(grid: Grid, ground: Ground, rng: np.random.Generator, share: float) -> None:
    """Strews angular rocks, small ones most often, until they cover about `share` of the visible ground."""
    top, bottom = max(grid.horizon, -0.04), 1.0
    area, aim = 0.0, share * (bottom - max(top, 0))
    for _ in range(90):
        r = top + (bottom + 0.06 - top) * rng.uniform(0.04, 1) ** 0.8
        s = (1 - grid.horizon) / (r - grid.horizon)
        wide = float(min(0.015 * rng.uniform(0.02, 1) ** -0.62, 0.16)) * s**-0.55
        rise = rng.uniform(0.6, 1.2)
        area += _rock(grid, ground, rng, (rng.uniform(-0.55, 0.55), r), max(wide, 1.3 / grid.size_px) * s, rise)
        if area >= aim:
            return


def _rock(grid: Grid, ground: Ground, rng: np.random.Generator, at: Point, radius: float, rise: float) -> float:
    """Sets one rock down: planes cut from a block, so that it has faces and edges. Returns the picture share that it covers."""
    facets, spin = int(rng.integers(5, 9)), rng.uniform(0, 2 * np.pi)
    angle_K = (spin + 2 * np.pi * (np.arange(facets) + rng.uniform(-0.35, 0.35, facets)) / facets).astype(F32)
    reach_K, steep_K = rng.uniform(0.55, 1, facets).astype(F32), rng.uniform(0.7, 3.2, facets).astype(F32)
    cap, lean_x, lean_z = rng.uniform((0.35, -0.3, -0.3), (0.9, 0.3, 0.3))
    tone, dusty = rng.normal(0.95, 0.1), rng.uniform(0.0, 0.45)
    rows, columns, x, z = grid.window(at[0], at[1], radius)
    if x.size == 0:
        return 0.0
    sides = (reach_K[:, None, None] - x * np.cos(angle_K)[:, None, None] - z * np.sin(angle_K)[:, None, None]) * steep_K[:, None, None]
    shape = np.minimum(sides.min(axis=0), F32(cap) + x * F32(lean_x) + z * F32(lean_z)) * F32(radius * rise)
    here = ground.height[rows, columns]
    base = here[here.shape[0] // 2, here.shape[1] // 2]
    solid = (shape > 0) & (base + shape > here)
    bumps = ground.albedo[rows, columns] - 1
    np.copyto(here, base + shape + bumps * F32(0.03 * radius), where=solid)
    ground.kind[rows, columns][solid] = ROCK
    np.copyto(ground.albedo[rows, columns], F32(tone) + F32(0.5) * np.clip(bumps, -0.2, 0.2), where=solid)
    np.copyto(ground.dust[rows, columns], np.clip(F32(dusty) + shape * F32(0.3 / radius), 0, 1) * F32(0.8), where=solid)
    s = (1 - grid.horizon) / (at[1] - grid.horizon)
    return float(1.5 * (radius / s) ** 2 * (0.35 + 0.6 * rise))


def add_tracks(grid: Grid, ground: Ground, rng: np.random.Generator) -> None:
    """Presses two parallel wheel tracks with chevron treads and raised rims; rocks and bedrock that they cross are track as well."""
    width, gauge = rng.uniform(0.16, 0.24), rng.uniform(0.5, 0.66)
    middle, slant = rng.uniform(-0.22, 0.22), rng.uniform(-0.8, 0.8)
    bend = rng.uniform(-0.12, 0.12) / grid.focal
    ahead_R = (grid.z_R - grid.focal) / grid.focal
    path_R = middle + slant * ahead_R + bend * grid.focal * ahead_R**2
    across = (grid.x_RU - path_R[:, None].astype(F32)) * F32(np.cos(np.arctan(slant / grid.focal)))
    pitch = width * rng.uniform(0.3, 0.42)
    show_R = np.clip((pitch / grid.dz_R - 1.5) / 2, 0, 1).astype(F32)[:, None]
    run_R = (grid.z_R / pitch % 4096).astype(F32)[:, None]
    sink, worn = rng.uniform(0.006, 0.016), rng.uniform(0.72, 0.9)
    for side in (-0.5, 0.5):
        off = np.abs(across - F32(side * gauge))
        wheel = off < F32(width / 2)
        rim = smoothstep(0.7, 0.5, off / F32(width)) * ~wheel
        tread = np.sin((run_R + off * F32(1.1 / pitch)) * F32(2 * np.pi))
        ground.height += rim * F32(sink * 0.9)
        smooth_R = np.median(ground.height, axis=1, keepdims=True)
        bed = smooth_R + (ground.height - smooth_R) * F32(0.35) + tread * show_R * F32(pitch * 0.13) - F32(sink)
        np.copyto(ground.height, bed, where=wheel)
        np.copyto(ground.albedo, F32(worn) * (1 + F32(0.10) * tread * show_R), where=wheel)
        ground.kind[wheel] = TRACE


def add_holes(grid: Grid, ground: Ground, rng: np.random.Generator) -> None:
    """Drills one to three holes, each a dark bore in a collar of fresh tailings; both are class hole."""
    bright = rng.uniform(1.15, 1.6) if rng.uniform() < 0.7 else rng.uniform(0.55, 0.75)
    count = int(rng.integers(1, 4))
    for k in range(count):
        u = rng.uniform(-0.34, 0.34) if count == 1 else -0.36 + 0.72 * (k + rng.uniform(0.3, 0.7)) / count
        r, bore = rng.uniform(0.25, 0.85), rng.uniform(0.035, 0.062) * (1.35 if count == 1 else 1.0)
        s = (1 - grid.horizon) / (r - grid.horizon)
        spread, ragged = rng.uniform(1.7, 2.4), rng.uniform(0, 2 * np.pi, 3)
        rows, columns, x, z = grid.window(u, r, bore * s * spread * 1.4)
        distance, angle = np.hypot(x, z) * F32(spread * 1.4), np.arctan2(z, x)
        edge = F32(spread) * (1 + sum(F32(0.16 / (i + 1)) * np.sin((i + 2) * angle + F32(ragged[i])) for i in range(3)))
        collar, inside = distance < edge, distance < 1
        heap = np.clip(edge - distance, 0, 0.6) * F32(0.35 * bore * s)
        height, albedo = ground.height[rows, columns], ground.albedo[rows, columns]
        floor = height.mean()
        np.copyto(height, floor + (height - floor) * F32(0.4) + heap, where=collar)
        np.copyto(albedo, F32(bright) * (1 + F32(0.5) * (albedo - 1)), where=collar)
        np.copyto(albedo, F32(0.10) + F32(0.22) * smoothstep(0.55, 1.0, distance), where=inside)
        ground.kind[rows, columns][collar] = HOLE
        np.copyto(ground.dust[rows, columns], F32(0.15), where=collar)


def add_rover(picture_HWC: np.ndarray, mask_HW: np.ndarray, rng: np.random.Generator, dust_C: np.ndarray, gray: float) -> None:
    """Draws hardware that leans into the picture from a border (deck, wheel or arm), in place; its pixels are class rover.

    Args:
        picture_HWC: float32 [H, W, 3], 0..1.
        mask_HW: uint8 [H, W].
        rng: Draws what is seen, and where.
        dust_C: float32 [3], colour of the dust that has settled on it.
        gray: Overall brightness of the light on it.
    """
    size = mask_HW.shape[0]
    paint = _Paint(size, mirror=bool(rng.integers(2)))
    (_deck, _wheel, _arm)[int(rng.integers(3))](paint, rng)
    outline_HW, color_HWC = paint.arrays()
    down, across = np.mgrid[0:size, 0:size].astype(F32) / size
    light = F32(gray) * (1 + F32(rng.uniform(-0.35, 0.35)) * (across - 0.5) + F32(rng.uniform(-0.3, 0.1)) * (down - 0.5))
    settled = F32(rng.uniform(0.12, 0.4))
    color_HWC = color_HWC * (1 - settled) + dust_C * settled
    reach = max(1, size // 24)
    shadow = np.zeros_like(outline_HW)
    if rng.uniform() < 0.5:
        shadow[reach // 2 + 1 :, reach:] = outline_HW[: -(reach // 2) - 1, :-reach]
    else:
        shadow[reach // 2 + 1 :, :-reach] = outline_HW[: -(reach // 2) - 1, reach:]
    shadow &= ~outline_HW & (mask_HW >= SOIL)
    picture_HWC[shadow] *= F32(0.5)
    np.copyto(picture_HWC, color_HWC * light[..., None], where=outline_HW[..., None])
    mask_HW[outline_HW] = ROVER


class _Paint:
    """Flat polygons on a unit square, in the picture and in the outline alike, without smoothing: the mask stays exact."""

    def __init__(self, size_px: int, mirror: bool) -> None:
        self.size_px, self.mirror = size_px, mirror
        self.picture, self.outline = Image.new("RGB", (size_px, size_px)), Image.new("L", (size_px, size_px))
        self.color, self.shape = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.outline)

    def _at(self, points: list[Point]) -> list[Point]:
        return [((1 - x if self.mirror else x) * self.size_px, y * self.size_px) for x, y in points]

    def polygon(self, points: list[Point], tone: float) -> None:
        self.color.polygon(self._at(points), fill=_gray(tone))
        self.shape.polygon(self._at(points), fill=255)

    def line(self, points: list[Point], width: float, tone: float) -> None:
        thick = max(1, round(width * self.size_px))
        self.color.line(self._at(points), fill=_gray(tone), width=thick, joint="curve")
        self.shape.line(self._at(points), fill=255, width=thick, joint="curve")

    def disc(self, center: Point, radius: float, tone: float) -> None:
        (x, y), k = self._at([center])[0], radius * self.size_px
        self.color.ellipse((x - k, y - k, x + k, y + k), fill=_gray(tone))
        self.shape.ellipse((x - k, y - k, x + k, y + k), fill=255)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [H, W] outline and float32 [H, W, 3] colour in 0..1."""
        return np.asarray(self.outline) > 0, np.asarray(self.picture, F32) / 255


def _gray(tone: float) -> tuple[int, int, int]:
    value = min(max(tone, 0.02), 1.0) * 255
    return round(value), round(value), round(value * 1.02)


def _deck(paint: _Paint, rng: np.random.Generator) -> None:
    """Panels, bolts and a cable in the lower corner."""
    high, wide, tone = rng.uniform(0.14, 0.26), rng.uniform(0.4, 0.75), rng.uniform(0.5, 0.85)
    fall = rng.uniform(0.04, 0.14)
    paint.polygon([(0, 1 - high), (wide, 1 - high + fall), (wide * 1.1, 1), (0, 1)], tone)
    paint.line([(0, 1 - high), (wide, 1 - high + fall), (wide * 1.1, 1)], 0.014, tone * 0.45)
    split = rng.uniform(0.35, 0.65)
    paint.line([(wide * split, 1 - high + fall * split), (wide * split * 1.06, 1)], 0.01, tone * 0.3)
    paint.polygon(
        [(wide * 0.06, 1 - high * 0.7), (wide * split * 0.8, 1 - high * 0.62), (wide * split * 0.8, 1), (wide * 0.06, 1)], tone * 0.62
    )
    for k in range(5):
        paint.disc((wide * (0.1 + 0.2 * k), 1 - high + fall * (0.1 + 0.2 * k) + 0.035), 0.009, tone * 0.35)
    if rng.uniform() < 0.6:
        x, top = rng.uniform(0.05, wide * 0.6), rng.uniform(0.1, 0.2)
        paint.polygon([(x, 1 - high - top), (x + 0.07, 1 - high - top), (x + 0.09, 1 - high * 0.5), (x - 0.01, 1 - high * 0.5)], tone * 0.8)
    paint.line([(0, 1 - high * 0.4), (wide * 0.4, 1 - high * 0.55), (wide * 0.8, 1 - high * 0.2), (wide, 1)], 0.018, 0.12)


def _wheel(paint: _Paint, rng: np.random.Generator) -> None:
    """A wheel seen from the side and a little from ahead, with grousers across its tread, cut by the side of the picture."""
    radius, x, y = rng.uniform(0.2, 0.28), rng.uniform(-0.05, 0.08), rng.uniform(0.6, 0.95)
    tone, turn, wide = rng.uniform(0.28, 0.5), rng.uniform(0, 1), rng.uniform(0.04, 0.1)
    paint.disc((x + wide, y - wide * 0.2), radius, tone * 0.5)
    paint.disc((x + wide * 0.5, y - wide * 0.1), radius, tone * 0.55)
    for k in range(26):
        angle = 2 * np.pi * (k + turn) / 26
        out_x, out_y = radius * 1.02 * np.cos(angle), radius * 1.02 * np.sin(angle)
        if out_x > -0.3 * radius:
            paint.line([(x + out_x, y + out_y), (x + out_x + wide, y + out_y - wide * 0.2)], 0.012, tone * 1.5)
    paint.disc((x, y), radius, tone)
    paint.disc((x, y), radius * 0.86, tone * 0.45)
    for k in range(6):
        angle = 2 * np.pi * (k + turn) / 6
        rim = (x + radius * 0.86 * np.cos(angle), y + radius * 0.86 * np.sin(angle))
        paint.line(
            [(x, y), (x + 0.5 * (rim[0] - x) - 0.04 * np.sin(angle), y + 0.5 * (rim[1] - y) + 0.04 * np.cos(angle)), rim], 0.018, tone
        )
    paint.disc((x, y), radius * 0.26, tone * 1.3)
    paint.disc((x, y), radius * 0.12, tone * 0.5)
    paint.polygon([(x - 0.2, y - radius * 0.3), (x, y - 0.03), (x, y + 0.03), (x - 0.2, y - radius * 0.1)], tone * 1.4)


def _arm(paint: _Paint, rng: np.random.Generator) -> None:
    """A jointed arm or mast that comes in from above or from the side."""
    tone, width = rng.uniform(0.55, 0.85), rng.uniform(0.09, 0.13)
    start = (-0.05, rng.uniform(0.1, 0.5))
    elbow = (rng.uniform(0.25, 0.42), start[1] + rng.uniform(-0.08, 0.2))
    hand = (elbow[0] + rng.uniform(0.02, 0.2), elbow[1] + rng.uniform(0.16, 0.3))
    for a, b, k in ((start, elbow, 1.0), (elbow, hand, 0.75)):
        paint.line([a, b], width * k, tone * 0.55)
        paint.line([(a[0], a[1] - 0.02 * k), (b[0], b[1] - 0.02 * k)], width * 0.6 * k, tone)
    paint.line([(start[0], start[1] + 0.05), (elbow[0], elbow[1] + 0.05), (hand[0] - 0.03, hand[1])], 0.014, 0.12)
    paint.disc(elbow, width * 0.72, tone * 0.7)
    paint.disc(elbow, width * 0.4, tone * 1.1)
    x, y = hand
    paint.polygon([(x - 0.08, y - 0.05), (x + 0.08, y - 0.06), (x + 0.09, y + 0.07), (x - 0.07, y + 0.08)], tone * 0.45)
    paint.polygon([(x - 0.05, y - 0.03), (x + 0.03, y - 0.035), (x + 0.035, y + 0.03), (x - 0.045, y + 0.035)], tone * 0.9)
