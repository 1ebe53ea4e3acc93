"""A small model and archive for the stream tests, and what reads their outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from raysal.archive.tables import manifest_schema, read_table
from raysal.config import Config, build

SCORES = ("entropy", "uncertainty", "margin", "bald")
DIM = 16


def configured(**compute: int) -> Config:
    return build(
        {
            "model": {"arch": "DeepLabV3Plus", "encoder": "tu-mobilenetv3_small_050"},
            "score": {"scores": list(SCORES), "bald_passes": 2, "embedding_dim": DIM, "batch_size": 4},
            "runtime": {"kind": "eager"},
            "compute": {"score_actors": 2, "in_process": 0, **compute},
        }
    )


def manifest_at(archive: Path) -> pa.Table:
    images = sorted((archive / "images").iterdir())
    rows = [{"id": f"{7919 * n % 9973:032x}", "uri": str(path), "exclude": []} for n, path in enumerate(images)]
    return pa.Table.from_pylist(rows, schema=manifest_schema())


def by_id(uri: str | Path) -> dict[str, dict]:
    rows = read_table(str(uri)).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows), "an image has two rows"
    return {row["id"]: row for row in rows}


def assert_same_scores(a: dict[str, dict], b: dict[str, dict], atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for column in SCORES:
        np.testing.assert_allclose([a[i][column] for i in a], [b[i][column] for i in a], atol=atol, rtol=0, err_msg=column)
    for i in a:
        np.testing.assert_allclose(a[i]["class_fractions"], b[i]["class_fractions"], atol=1e-5)
        np.testing.assert_allclose(a[i]["embedding"], b[i]["embedding"], atol=2e-3)  # float16


def actor_pids() -> list[int]:
    """Processes of this test's own Ray that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            pass  # ended meanwhile
    return found
