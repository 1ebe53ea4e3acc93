"""From ground to picture: sunlight, cast shadows, what hides what, and colour."""

from __future__ import annotations

import numpy as np

from raysal.datasets.synthetic_light import Weather
from raysal.datasets.synthetic_terrain import F32, Grid, Ground, smoothstep


def sunlight(grid: Grid, height_RU: np.ndarray, azimuth: float, elevation: float, ambient: float) -> np.ndarray:
    """Brightness float32 [R, U] of a matt surface (Lambert) with cast shadows; 1 on flat ground in full sun.

    Args:
        grid: The ground grid.
        height_RU: Heights in view widths.
        azimuth: Where the sun stands, radians; 0 ahead of the camera, pi / 2 to its right.
        elevation: The sun's height above the horizon, radians.
        ambient: Share of the light that comes from the dusty sky and reaches into shadows.
    """
    slope_x = np.empty_like(height_RU)
    slope_x[:, 1:-1] = height_RU[:, 2:] - height_RU[:, :-2]
    slope_x[:, (0, -1)] = slope_x[:, (1, -2)]
    slope_x *= (0.5 / grid.dx_R)[:, None].astype(F32)
    slope_z = np.empty_like(height_RU)
    slope_z[:-1] = height_RU[1:] - height_RU[:-1]
    slope_z[-1] = slope_z[-2]
    slope_z *= (1 / grid.dz_R)[:, None].astype(F32)
    to_x, to_z = np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth)
    facing = F32(np.sin(elevation)) - slope_x * F32(to_x) - slope_z * F32(to_z)
    facing /= np.sqrt(1 + slope_x * slope_x + slope_z * slope_z)
    direct = np.clip(facing / F32(np.sin(elevation)), 0, 1.9)
    direct *= 1 - _shadow(grid, height_RU, azimuth, elevation)
    return F32(ambient) + F32(1 - ambient) * direct


def _shadow(grid: Grid, height_RU: np.ndarray, azimuth: float, elevation: float) -> np.ndarray:
    """Share of the sun hidden, float32 [R, U].

    A step of a * s towards the sun moves a grid point to s' = s (1 + a cos / focal), u' = (u + a sin) / (1 + a cos / focal):
    rows and columns move apart from each other, so that one step is two one-dimensional look-ups.
    """
    size, horizon = grid.size_px, grid.horizon
    steepest = np.full(grid.shape, -9, F32)
    shortest = 1.6 / size
    steps = np.geomspace(shortest, max(0.3, 4 * shortest), 11)
    for a in steps:
        c = 1 + a * np.cos(azimuth) / grid.focal
        row_R = np.rint((grid.r_R[0] - (horizon + (grid.r_R - horizon) / c)) * size).astype(np.int64)
        column_U = np.rint(((grid.u_U + a * np.sin(azimuth)) / c + 0.5) * size - 0.5).astype(np.int64)
        ahead = height_RU[np.clip(row_R, 0, len(row_R) - 1)][:, np.clip(column_U, 0, size - 1)]
        ahead -= height_RU
        ahead *= (1 / (a * grid.s_R))[:, None].astype(F32)
        np.maximum(steepest, ahead, out=steepest)
    limit = float(np.tan(elevation))
    return smoothstep(limit * 0.9, limit * 1.15 + 0.03, steepest)


def project(grid: Grid, height_RU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which ground sample each pixel sees.

    Returns:
        int32 [H, W], flat indices into the grid, and bool [H, W], where the ground is seen at all (not the sky or a ridge behind it).
    """
    n, size = grid.shape[0], grid.size_px
    lift = height_RU * (grid.lift * size / grid.s_R)[:, None].astype(F32)
    y = (grid.r_R * size - 0.5)[:, None].astype(F32) - lift
    np.minimum.accumulate(y, axis=0, out=y)
    first = np.clip(np.ceil(y - F32(0.02)), 0, size).astype(np.int32)
    first *= size
    first += np.arange(size, dtype=np.int32)
    counts = np.bincount(first.ravel(), minlength=(size + 1) * size).reshape(size + 1, size)
    nearer = np.cumsum(counts[::-1], axis=0, dtype=np.int32)[::-1]
    row = nearer[1:]
    seen = row < n if grid.horizon > -0.04 else np.ones((size, size), bool)
    return np.minimum(row, n - 1) * size + np.arange(size, dtype=np.int32), seen


def colored(
    pixel_HW: np.ndarray, light_RU: np.ndarray, ground: Ground, grid: Grid, colors: tuple[np.ndarray, np.ndarray], weather: Weather
) -> tuple[np.ndarray, np.ndarray]:
    """The ground as it is seen.

    Args:
        pixel_HW: int32 [H, W], from `project`.
        light_RU: float32 [R, U], sunlight times the brightness of the surface.
        ground: Classes and dust.
        grid: The ground grid.
        colors: float32 [9, 3], one colour a class, and float32 [3], the dust's.
        weather: Its haze hides what is far.

    Returns:
        float32 [H, W, 3], 1 is white, and uint8 [H, W] classes.
    """
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
    even = light_HW.copy()
    for k in (-2, -1, 1, 2):
        even += np.roll(light_HW, k * reach, axis=1)
    y, _ = np.nonzero(where)
    row = row_HW[where]
    height = (grid.r_R[row] - (y + 0.5) / grid.size_px) * grid.s_R[row]
    beds = 0.2 + 0.024 * np.sin(height * 700) + 0.02 * np.sin(height * 290 + 1)
    light_HW[where] = even[where] * beds.astype(F32)
    return light_HW
