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
from dataclasses import replace

import numpy as np
from PIL import Image

from raysal.archive.uris import exists, join, list_names, open_fs, read_bytes, write_bytes
from raysal.datasets.synthetic_light import backdrop, expose
from raysal.datasets.synthetic_plan import aim, group_of, plan_of, site_of, stream
from raysal.datasets.synthetic_render import colored, project, sunlight
from raysal.datasets.synthetic_terrain import RIDGE, Grid, lay
from raysal.datasets.synthetic_things import add_holes, add_rocks, add_rover, add_tracks
from raysal.errors import DataError
from raysal.images.masks import encode_mask
from raysal.labels import S5MARS

VERSION = 1
"""Of the generator: another number means other pixels for the same seed."""
VAL_START = 1_000_000
"""Validation scenes are numbered from here: other sites than the pool's, and the same ones whatever the pool's size."""
WORKERS = 4


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
    plan, site, rng = plan_of(seed, index), site_of(seed, group_of(seed, index)), stream(seed, 0, index)
    weather = replace(site.weather, azimuth=rng.uniform(-np.pi, np.pi))  # each scene looks another way
    horizon, crest = aim(plan, rng)
    geology = replace(site.geology, relief=site.geology.relief * min(1.0, 1.2 * (1 - horizon)))
    zoom = 2.2 if plan.kind.startswith("vista") else 1.0
    grid = Grid(size_px, horizon, site.focal * zoom, rng.uniform(0, 512, (48, 2)))
    ground = lay(grid, geology, plan.soil, plan.sand, plan.bedrock)
    if plan.kind == "trace":
        add_tracks(grid, ground, rng)
    if plan.kind == "hole":
        add_holes(grid, ground, rng)
    if plan.rock > 0:
        add_rocks(grid, ground, stream(seed, 2, index), plan.rock)
    light_RU = sunlight(grid, ground.height, weather.azimuth, weather.elevation, weather.ambient) * ground.albedo
    pixel_HW, seen_HW = project(grid, ground.height)
    picture_HWC, mask_HW = colored(pixel_HW, light_RU, ground, grid, (site.colors, site.dust), weather)
    if not seen_HW.all():
        behind_HWC, behind_HW = backdrop(size_px, weather, crest, max(horizon, 0.02), site.colors[RIDGE], stream(seed, 3, index))
        np.copyto(picture_HWC, behind_HWC, where=~seen_HW[..., None])
        np.copyto(mask_HW, behind_HW, where=~seen_HW)
    if plan.rover:
        add_rover(picture_HWC, mask_HW, stream(seed, 4, index), site.dust, 0.75 + 0.35 * weather.ambient)
    camera = replace(site.camera, exposure=site.camera.exposure * rng.uniform(0.9, 1.1), blur=site.camera.blur * size_px / 320 + 0.3)
    return expose(picture_HWC, camera, stream(seed, 5, index)), mask_HW


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
        DataError: The folder holds scenes of another seed, size or generator version, or a number is out of range.
        InputError: The disk is full, or the URI's driver is missing.
    """
    if not 0 <= images <= VAL_START or val_images < 0 or seed < 0 or size_px < 32:
        raise DataError(
            f"{out_uri}: asked for {images} + {val_images} scenes of {size_px} px, seed {seed}; "
            f"give 0 to {VAL_START} images, 32 px or more, and no negative number"
        )
    _claim(out_uri, {"generator": "raysal synthetic scenes", "version": VERSION, "seed": seed, "size_px": size_px})
    splits = {"train": list(range(images)), "val": list(range(VAL_START, VAL_START + val_images))}
    indices = [index for split in splits.values() for index in split]
    present = {kind: set(list_names(join(out_uri, kind))) for kind in ("images", "masks")}
    with ThreadPoolExecutor(WORKERS) as pool:  # drawing leaves the interpreter lock now and then, writing waits for the disk
        try:
            for done, _ in enumerate(pool.map(lambda index: _write_scene(out_uri, seed, index, size_px, present), indices), 1):
                if progress:
                    progress(done, len(indices))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
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
            theirs = "an unreadable synthetic.json"
        if theirs != ours:
            raise DataError(
                f"{out_uri}: holds synthetic scenes made with {theirs}, asked for {ours}; name another folder or remove this one"
            )
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
