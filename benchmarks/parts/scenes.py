"""Archives and models that benchmarks of the streams make for themselves."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from raysal.archive.tables import write_table
from raysal.config import ModelConfig
from raysal.datasets.synthetic import write_archive
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch

ENCODER = "tu-mobilenetv3_small_100"


def scenes(folder: Path, images: int, px: int) -> list[str]:
    """Synthetic scenes as PNG files; their paths."""
    write_archive(str(folder), images, 1, px, 0)
    return [str(file) for file in sorted((folder / "images").iterdir())[:images]]


def manifest(file: Path, uris: list[str]) -> str:
    """A manifest of images, which may name a file several times under different ids. Returns its place."""
    ids = [f"{i:032x}" for i in range(len(uris))]
    write_table(str(file), pa.table({"id": ids, "uri": uris}))
    return str(file)


def untrained(folder: Path, px: int, encoder: str = ENCODER, scale: float = 1.0) -> str:
    """A checkpoint of an untrained model, whose images enter resized by a scale; its place."""
    model = ModelConfig(encoder=encoder)
    save(str(folder), TwoBranch(model, S5MARS.n_classes, 0), ModelInfo(S5MARS, model, scale, px))
    return str(folder)
