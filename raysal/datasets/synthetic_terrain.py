"""The ground of a synthetic scene: a height field in perspective, and what it is made of.

Everything is drawn on a *ground grid*: rows run from below the picture's lower edge away to the horizon, columns are the picture's.
The unit of length is the width of the view at the lower edge. A row at height r (0 top, 1 bottom) lies at the scale
s = (1 - horizon) / (r - horizon): things there look 1 / s as large, x = (u - 1/2) s across, z = focal s away. `synthetic_render`
then lifts each sample by its height and lets near ones hide far ones, so that mask and picture come from the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SKY, RIDGE, SOIL, SAND, BEDROCK, ROCK, ROVER, TRACE, HOLE = range(9)
CELLS = 16  # slabs along each side of the slab texture
BELOW = 0.12  # share of the picture's height that the grid reaches below its lower edge, for things that stand up into view
F32 = np.float32


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below low, 1 above high, smooth between."""
    t = np.clip((x - F32(low)) / F32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


@lru_cache(maxsize=1)
def noise_texture() -> np.ndarray:
    """float32 [512, 513]: tileable noise of one wavelength (8 texels), mean 0, std 1; the last column repeats the first."""
    rng = np.random.Generator(np.random.Philox(1))
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None, :])
    band = np.exp(-(((frequency * 8 - 1) / 0.4) ** 2))
    wave = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((512, 512))) * band, s=(512, 512))
    wave = (wave / wave.std()).astype(F32)
    return np.concatenate([wave, wave[:, :1]], axis=1)


@lru_cache(maxsize=1)
def slab_texture() -> tuple[np.ndarray, np.ndarray]:
    """Polygonal slabs: distance to the nearest crack (float32 [768, 768], unit: one slab) and the slab's number (int32)."""
    n = 768
    rng = np.random.Generator(np.random.Philox(2))
    points = rng.uniform(0.08, 0.92, (CELLS, CELLS, 2)).astype(F32)
    axis = (np.arange(n, dtype=F32) + F32(0.5)) * F32(CELLS / n)
    cell = axis.astype(np.int32)
    first, second = np.full((n, n), 9, F32), np.full((n, n), 9, F32)
    number = np.zeros((n, n), np.int32)
    for dz in (-1, 0, 1):
        for dx in (-1, 0, 1):
            z, x = (cell + dz) % CELLS, (cell + dx) % CELLS
            point = points[z[:, None], x[None, :]]
            away_z = (cell + dz)[:, None] + point[..., 0] - axis[:, None]
            away_x = (cell + dx)[None, :] + point[..., 1] - axis[None, :]
            distance = np.sqrt(away_z * away_z + away_x * away_x, dtype=F32)
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            number = np.where(nearer, z[:, None] * CELLS + x[None, :], number)
            first = np.where(nearer, distance, first)
    return second - first, number


class Grid:
    """The ground seen by one camera, row 0 nearest.

    Args:
        size_px: Height and width of the picture.
        horizon: Row of the flat ground's horizon, as a share of the height; negative: above the picture, the camera looks down.
        focal: Focal length in picture widths (1.2: a navigation camera; 6: a telephoto).
        offsets: float64 [n, 2], one a noise layer: where in the endless noise this scene lies.
    """

    def __init__(self, size_px: int, horizon: float, focal: float, offsets: np.ndarray) -> None:
        top = max(horizon, -0.05)
        rows = np.arange(int(size_px * (1 + BELOW)), -size_px, -1)
        r = (rows + 0.5) / size_px
        r = r[r > top + 0.4 / size_px]
        drop = max(0.5 - horizon, 0.0)
        self.lift = focal / np.hypot(focal, drop)  # looking down steeply shortens heights, and stretches the ground less
        focal = float(np.hypot(focal, drop))
        self.size_px, self.horizon, self.focal, self.offsets = size_px, horizon, focal, offsets
        self.r_R = r
        self.s_R = (1 - horizon) / (r - horizon)
        self.z_R = focal * self.s_R
        self.u_U = (np.arange(size_px) + 0.5) / size_px - 0.5
        self.x_RU = (self.s_R[:, None] * self.u_U[None, :]).astype(F32)
        self.dx_R = self.s_R / size_px
        self.dz_R = focal * self.s_R**2 / (1 - horizon) / size_px
        self.foot_R = np.sqrt(self.dx_R * self.dz_R)
        self.shape = self.x_RU.shape

    @property
    def seen(self) -> slice:
        """Rows of the grid that lie inside the picture where the ground is flat."""
        return slice(int((self.r_R >= 1).sum()), int((self.r_R > 0).sum()))

    def octave(self, wavelength: float, layer: int) -> tuple[int, np.ndarray]:
        """Noise of one wavelength in the rows near enough to show it: (rows n, float32 [n, U]), fading out at the limit."""
        fade_R = np.clip((wavelength / self.foot_R - 1.6) / 2.4, 0, 1)
        n = int((fade_R > 0).sum())
        texture, k = noise_texture(), 8 / wavelength
        offset_z, offset_x = self.offsets[layer % len(self.offsets)] * (1 + layer)
        z = (self.z_R[:n] * k + offset_z) % 512
        low = z.astype(np.int32)
        share = (z - low)[:, None].astype(F32)
        lines = (texture[low] * (1 - share) + texture[(low + 1) & 511] * share) * fade_R[:n, None].astype(F32)
        x = self.x_RU[:n] * F32(k) + F32(offset_x % 512 + 512 * 64)
        left = x.astype(np.int32)
        x -= left
        left &= 511
        left += (np.arange(n, dtype=np.int32) * 513)[:, None]
        lines = lines.ravel()
        value = lines.take(left)
        left += 1
        value += (lines.take(left) - value) * x
        return n, value

    def fbm(self, coarse: float, fine: float, hurst: float, layer: int) -> np.ndarray:
        """Fractal noise, float32 [R, U]: octaves from wavelength coarse down to fine, each of amplitude (wavelength / coarse)^hurst."""
        total = np.zeros(self.shape, F32)
        wavelength = coarse
        while wavelength >= max(fine, 2 / self.size_px / (1 + BELOW)):
            n, value = self.octave(wavelength, layer)
            value *= F32((wavelength / coarse) ** hurst)
            total[:n] += value
            wavelength, layer = wavelength / 2, layer + 1
        return total

    def slabs(self, slab: float, turn: float, bend_RU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slab texture laid on the ground: distance to the nearest crack (float32 [R, U], in slabs) and slab numbers (int32)."""
        edge, number = slab_texture()
        n = len(edge)
        k = n / CELLS / slab
        offset_z, offset_x = self.offsets[-1]
        cos, sin = F32(np.cos(turn) * k), F32(np.sin(turn) * k)
        z_R = (self.z_R[:, None] % (slab * CELLS * 64)).astype(F32)
        x = self.x_RU * cos + (z_R * sin + F32(offset_x * n / 512)) + bend_RU * F32(k * slab)
        z = self.x_RU * -sin + (z_R * cos + F32(offset_z * n / 512)) + bend_RU * F32(k * slab * 0.7)
        row, column = np.floor(z), np.floor(x)
        z -= row
        x -= column
        row, column = row.astype(np.int32) % n, column.astype(np.int32) % n
        next_row, next_column = (row + 1) % n * n, (column + 1) % n
        row *= n
        upper = edge.take(row + column)
        upper += (edge.take(row + next_column) - upper) * x
        lower = edge.take(next_row + column)
        lower += (edge.take(next_row + next_column) - lower) * x
        upper += (lower - upper) * z
        return upper, number.take(row + column)

    def window(self, u: float, r: float, radius: float) -> tuple[slice, slice, np.ndarray, np.ndarray]:
        """Grid cells around the ground point seen at (u, r): row and column slices, and cross and depth offsets in radii, [h, w]."""
        s = (1 - self.horizon) / (r - self.horizon)
        reach_z = max(radius, 0.8 * self.focal * s * s / (1 - self.horizon) / self.size_px)
        low, high = np.searchsorted(self.z_R, (self.focal * s - reach_z, self.focal * s + reach_z))
        near = min(self.s_R[min(low, len(self.s_R) - 1)], s)
        left, right = np.searchsorted(
            self.u_U, ((u * s - radius) / near - 0.5 / self.size_px, (u * s + radius) / near + 0.5 / self.size_px)
        )
        rows, columns = slice(int(low), int(high)), slice(int(left), int(right))
        return rows, columns, (self.x_RU[rows, columns] - u * s) / radius, ((self.z_R[rows, None] - self.focal * s) / reach_z).astype(F32)


@dataclass
class Ground:
    """What lies on the grid: heights (in view widths), classes, brightness of the surface, and share of dust on it; all [R, U]."""

    height: np.ndarray
    kind: np.ndarray
    albedo: np.ndarray
    dust: np.ndarray


@dataclass(frozen=True)
class Geology:
    """How the ground of one site is built; see `lay` for how each is used."""

    relief: float  # height of swells
    slab: float  # width of a slab
    turn: float  # direction of cracks and ripples, radians
    thickness: float  # height of slabs and ledges
    ledges: float  # 0: pavement of slabs, 1: bedding that crops out in steps
    patchiness: float  # 0: soil fills the gaps between slabs, 1: soil lies in wide patches
    pebbles: float  # how stony the soil is
    ripple: float  # distance between sand ripples
    roughness: float


def lay(grid: Grid, geology: Geology, soil: float, sand: float, bedrock: bool) -> Ground:
    """Lays bedrock, floods its low places with soil, and blows sand over both.

    Args:
        grid: The ground grid.
        geology: The site's build.
        soil: Share of the visible ground that is soil; 0: none.
        sand: Share that is sand; 0: none.
        bedrock: Whether any bedrock shows; without it, soil takes its place (or sand, where there is no soil).
    """
    swell = grid.fbm(2.0, 0.5, 1.0, 0) * F32(geology.relief)
    fine = grid.fbm(0.12, 0.0, 0.8, 3)
    mottle = grid.fbm(0.4, 0.1, 0.5, 8)
    rock_height, albedo = _bedrock(grid, geology, fine, mottle)
    patch = grid.fbm(1.5, 0.2, 0.9, 12) * F32(geology.thickness * (0.25 + 1.5 * geology.patchiness))
    ground = Ground(swell + rock_height, np.full(grid.shape, BEDROCK, np.uint8), albedo, np.clip(0.22 + 0.2 * mottle, 0, 1))
    low = rock_height + patch
    level = np.inf if not bedrock else _quantile(grid, low, soil) if soil > 0 else -np.inf
    if soil > 0 or not bedrock:
        _soil(grid, geology, ground, low < level, swell + (min(level, 0) - patch) * F32(0.5), fine)
    if sand > 0:
        _sand(grid, geology, ground, swell, sand if bedrock or soil > 0 else 1.0)
    return ground


def _quantile(grid: Grid, field_RU: np.ndarray, share: float) -> float:
    step = max(1, grid.size_px // 64)
    return float(np.quantile(field_RU[grid.seen][::step, ::step], min(max(share, 0.0), 1.0)))


def _bedrock(grid: Grid, geology: Geology, fine_RU: np.ndarray, mottle_RU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bend = grid.fbm(0.5, 0.05, 1.25, 18)
    edge, number = grid.slabs(geology.slab, geology.turn, bend * F32(0.2))
    tone = np.random.Generator(np.random.Philox(3)).standard_normal(CELLS * CELLS).astype(F32)
    crack = smoothstep(0.01, 0.16, edge)
    pavement = crack * (F32(0.75) + F32(0.22) * tone.take(number))
    bed = geology.slab * 1.3
    across = grid.x_RU * F32(np.sin(geology.turn) / bed) + (grid.z_R * np.cos(geology.turn) / bed % 1024).astype(F32)[:, None]
    climb = across + grid.fbm(0.8, 0.1, 1.3, 22) * F32(0.45) + bend * F32(0.10)
    step = climb - np.floor(climb)
    bedding = smoothstep(0.0, 0.12, step) * (1 - F32(0.8) * step) + F32(0.25) * crack
    height = pavement * F32(1 - geology.ledges) + bedding * F32(geology.ledges)
    height = height * F32(geology.thickness) + fine_RU * F32(0.0016 * geology.roughness)
    laminae = np.sin(height * F32(55 / geology.thickness))
    albedo = 1 + F32(0.06) * mottle_RU + F32(0.05) * laminae * F32(geology.ledges) + F32(0.05) * tone.take(number) + F32(0.05) * fine_RU
    return height, albedo * (F32(0.62) + F32(0.38) * smoothstep(0.0, 0.07, edge))


def _soil(grid: Grid, geology: Geology, ground: Ground, where: np.ndarray, base_RU: np.ndarray, fine_RU: np.ndarray) -> None:
    stones = np.zeros(grid.shape, F32)
    wavelength, layer = 0.09, 24
    while wavelength > 2 / grid.size_px:
        n, value = grid.octave(wavelength, layer)
        stones[:n] += np.maximum(value - F32(2.1 - 1.1 * geology.pebbles), 0) * F32(wavelength * 0.13)
        wavelength, layer = wavelength * 0.6, layer + 1
    stony = np.minimum(stones * 300, 1)
    height = base_RU + fine_RU * F32(0.0008) + stones
    grains = grid.octave(max(0.012, 2.5 / grid.size_px), 34)
    albedo = 1 - F32(0.14) * stony + F32(0.03) * fine_RU
    albedo[: grains[0]] += F32(0.035) * grains[1]
    _put(ground, where, SOIL, height, albedo, 1 - F32(0.55) * stony)


def _sand(grid: Grid, geology: Geology, ground: Ground, swell_RU: np.ndarray, share: float) -> None:
    drift = grid.fbm(1.6, 0.2, 1.2, 38)
    edge = _quantile(grid, drift, 1 - share) if share < 1 else -np.inf
    warp = grid.fbm(0.6, 0.1, 1.0, 44)
    height = swell_RU + F32(0.35 * geology.thickness) + (drift - F32(max(edge, -1))) * F32(0.03)
    shade = np.zeros(grid.shape, F32)
    for scale in (1.0, 4.5):
        period = geology.ripple * scale
        along = grid.x_RU * F32(np.sin(geology.turn) / period) + (grid.z_R * np.cos(geology.turn) / period % 4096).astype(F32)[:, None]
        phase = (along + warp * F32(0.02 * scale**0.5 / period)) * F32(2 * np.pi)
        show = np.clip((period / np.maximum(grid.dz_R, grid.dx_R) - 2) / 3, 0, 1).astype(F32)[:, None]
        wave = (np.sin(phase) + F32(0.3) * np.sin(2 * phase + F32(0.9))) * show
        height += wave * F32(period * 0.042)
        shade += wave * F32(0.03)
    _put(ground, drift > edge, SAND, height, 1 + shade, np.full(grid.shape, 0.8, F32))


def _put(ground: Ground, where: np.ndarray, kind: int, height: np.ndarray, albedo: np.ndarray, dust: np.ndarray) -> None:
    ground.kind[where] = kind
    np.copyto(ground.height, height, where=where)
    np.copyto(ground.albedo, albedo, where=where)
    np.copyto(ground.dust, dust.astype(F32, copy=False), where=where)
