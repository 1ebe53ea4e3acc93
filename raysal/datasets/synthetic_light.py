"""What is behind and in front of the synthetic ground: sky, distant ridges, haze, and the camera that takes the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from raysal.datasets.synthetic_terrain import F32, RIDGE, SKY, noise_texture, smoothstep

Rgb = np.ndarray
"""float32 [3], 0..1."""


@dataclass(frozen=True)
class Weather:
    """Light and dust of one site and time of day."""

    azimuth: float  # of the sun against the camera's axis, radians
    elevation: float  # radians
    ambient: float  # share of light from the sky
    haze: float  # 0 clear, 1 a dust storm
    sky: Rgb  # colour of the sky high up
    horizon: Rgb  # colour of the sky at the horizon, and of the haze


@dataclass(frozen=True)
class Camera:
    """How one instrument turns light into numbers."""

    gray: bool  # a navigation camera
    balance: Rgb  # gain of R, G, B: raw Bayer pictures are greenish, balanced ones tan
    exposure: float
    contrast: float
    vignette: float  # loss of light in the corners
    blur: float  # of the lens, pixels
    noise: float  # of the sensor, at full scale 1


def backdrop(size_px: int, weather: Weather, crest: float | None, foot: float, strata: Rgb, rng: np.random.Generator) -> tuple[Rgb, Rgb]:
    """Sky and ridges, as if no ground stood before them.

    Args:
        size_px: Height and width.
        weather: Light and dust.
        crest: Row of the highest ridge's crest as a share of the height; negative: ridges fill the picture; None: no ridge.
        foot: Row where ridges meet the ground.
        strata: Colour of the ridges' rock.
        rng: Draws their shapes.

    Returns:
        float32 [H, W, 3] in 0..1 and uint8 [H, W] classes (sky, ridge).
    """
    down_H = (np.arange(size_px, dtype=F32) + F32(0.5))[:, None] / size_px
    glow = np.exp(-((((np.arange(size_px) + 0.5) / size_px - 0.5 - 0.6 * np.sin(weather.azimuth)) / 0.8) ** 2)).astype(F32)
    depth = np.clip(down_H / F32(max(foot, 0.2)), 0, 1) ** F32(1.3)
    picture = weather.sky * (1 - depth[..., None]) + weather.horizon * depth[..., None]
    picture = picture * (1 + F32(0.10) * glow[None, :, None] * depth[..., None])
    mask = np.full((size_px, size_px), SKY, np.uint8)
    if crest is None:
        return picture, mask
    layers = int(rng.integers(1, 4)) if crest >= 0 else int(rng.integers(1, 3))
    for k in range(layers):
        share = k / max(layers, 1)
        height = (foot - max(crest, 0)) * (1 - share)
        top_W = foot - height * _skyline(size_px, rng)
        if crest < 0 and k == 0:
            top_W = np.full(size_px, -0.01)
        where = down_H >= top_W[None, :].astype(F32)
        veil = F32(np.clip(rng.uniform(0.55, 0.85) * (1 - 0.55 * (k + rng.uniform(0.2, 1)) / layers) + 0.35 * weather.haze, 0.12, 0.9))
        slope = _slope(size_px, down_H, top_W, weather, rng)
        color = strata * slope[..., None] * (1 - veil) + weather.horizon * veil
        np.copyto(picture, color, where=where[..., None])
        mask[where] = RIDGE
    return picture, mask


def _skyline(size_px: int, rng: np.random.Generator) -> np.ndarray:
    """A fractal crest, float64 [W], 0.35..1 of its height, with flat tops now and then (mesas)."""
    x = np.arange(size_px) / size_px
    line = np.zeros(size_px)
    for octave in range(7):
        knots = rng.standard_normal(2**octave + 3)
        line += np.interp(x * 2**octave + rng.uniform(0, 1), np.arange(len(knots)), knots) * 0.5**octave
    line = (line - line.min()) / max(np.ptp(line), 1e-6)
    if rng.uniform() < 0.35:
        line = np.minimum(line, rng.uniform(0.55, 0.9)) / 0.9
    return 0.35 + 0.65 * line * min(1.0, 1 / max(line.max(), 1e-6))


def _slope(size_px: int, down_H: np.ndarray, top_W: np.ndarray, weather: Weather, rng: np.random.Generator) -> np.ndarray:
    """Brightness float32 [H, W] of a far hillside: gullies lit from the side, beds of unequal thickness, talus below."""
    relief = np.zeros((size_px, size_px), F32)
    wavelength, tall = rng.uniform(0.35, 0.8), rng.uniform(1.5, 3.0)
    while wavelength > 2.5 / size_px:
        relief += (F32(0.7) - np.abs(_sheet(size_px, wavelength, wavelength * tall, rng))) * F32(wavelength)
        wavelength, tall = wavelength * 0.55, 1 + (tall - 1) * 0.8
    lit = np.zeros_like(relief)
    lit[:, 1:-1] = (relief[:, 2:] - relief[:, :-2]) * F32(size_px * 0.09)
    lit *= F32(-np.sin(weather.azimuth) if abs(np.sin(weather.azimuth)) > 0.3 else 0.3)
    lit[1:] += (relief[1:] - relief[:-1]) * F32(size_px * 0.12)
    beds = rng.standard_normal(64).astype(F32) * (rng.uniform(0, 1, 64) < 0.6)
    beds = np.convolve(np.repeat(beds, 8), np.ones(5) / 5, mode="same").astype(F32)
    tilt = F32(rng.uniform(-0.25, 0.25))
    across = (np.arange(size_px, dtype=F32) / size_px)[None, :]
    level = (down_H + tilt * across + relief * F32(0.2)) * F32(rng.uniform(60, 200))
    bedding = beds.take(level.astype(np.int32) % len(beds))
    bare = smoothstep(-0.8, 0.6, _sheet(size_px, 0.6, 0.25, rng) - relief)
    dunes = smoothstep(0.3, 1.1, _sheet(size_px, 0.9, 0.12, rng)) * F32(rng.uniform(0, 0.35))
    relief_tone = F32(rng.uniform(0.12, 0.42)) * np.tanh(lit)
    return np.clip(F32(0.92) + relief_tone * (1 - dunes) + F32(rng.uniform(0.05, 0.3)) * bedding * bare - dunes, 0.15, 1.6)


def _sheet(size_px: int, wide: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Noise on the picture plane, float32 [H, W], of wavelengths wide and high (shares of the picture)."""
    texture, axis = noise_texture(), np.arange(size_px) / size_px
    offset = rng.uniform(0, 512, 2)
    y, x = (axis * 8 / high + offset[0]) % 512, (axis * 8 / wide + offset[1]) % 512
    row, column = y.astype(np.int32), x.astype(np.int32)
    down, right = (y - row)[:, None].astype(F32), (x - column)[None, :].astype(F32)
    lines = texture[row] * (1 - down) + texture[(row + 1) & 511] * down
    return lines[:, column] * (1 - right) + lines[:, column + 1] * right


def expose(picture_HWC: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """The picture as the camera delivers it: uint8 [H, W, 3] from float32 0..1 (more is overexposed)."""
    size = picture_HWC.shape[0]
    if camera.gray:
        luminance_HW = F32(0.35) * picture_HWC[..., 0] + F32(0.45) * picture_HWC[..., 1] + F32(0.2) * picture_HWC[..., 2]
        picture_HWC = np.repeat(luminance_HW[..., None], 3, axis=2)
    else:
        picture_HWC = picture_HWC * camera.balance
    axis = (np.arange(size, dtype=F32) + F32(0.5)) / size - F32(0.5)
    fall = 1 - F32(camera.vignette) * (axis[:, None] ** 2 + axis[None, :] ** 2) * 2
    automatic = (0.47 / max(float(picture_HWC.mean()), 0.05)) ** 0.7
    level = picture_HWC * (fall * F32(camera.exposure * automatic))[..., None]
    level = (level - F32(0.42)) * F32(camera.contrast) + F32(0.42)
    image = Image.fromarray((np.clip(level, 0, 1) * 255 + F32(0.5)).astype(np.uint8))
    if camera.blur > 0.05:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur))
    grain = rng.standard_normal((size, size, 1), dtype=F32)
    if not camera.gray:  # colour noise of a Bayer sensor is coarser than its brightness noise
        half = rng.standard_normal((size // 2 + 1, size // 2 + 1, 3), dtype=F32)
        grain = grain + F32(0.6) * half.repeat(2, axis=0).repeat(2, axis=1)[:size, :size]
    grain *= F32(camera.noise * 255)
    level = np.asarray(image, F32)
    return np.clip(level + grain * (F32(0.5) + level * F32(1 / 255)) + F32(0.5), 0, 255).astype(np.uint8)
