"""Small labels tables, for the tests of exports."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raysal.archive.tables import labels_schema, write_table
from raysal.images.masks import encode_mask
from raysal.labels import LabelSet

THREE = LabelSet("three", ("soil", "big rock", "Fels & Geröll"), ((0, 0, 255), (0, 255, 0), (255, 0, 255)))
DIGEST = "0123456789abcdef" * 4

ROOTS = ("/data/mars/", "s3://mars/images/")
masks = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 1, 2, 255]))
"""uint8 masks of three classes and 255: from 1 x 1 on, often without some class, at times without any."""
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=9)
uris = st.lists(
    st.builds(
        lambda root, folder, name, ending: root + folder + name + ending,
        st.sampled_from(ROOTS),
        st.sampled_from(["", "sol 1/", "sol-2/", "漢字/", "a/b/", "../", "x.png/"]),
        st.one_of(st.sampled_from(["a", "A", "a b", "ä", "a\u0308", "火星", "#1", " x ", "con", "a.b", '"q"']), any_text),
        st.sampled_from([".jpg", ".png", ".JPG", ""]),
    ),
    min_size=1,
    max_size=8,
    unique=True,
)
"""URIs that collide, hide, climb and break lines."""


def id_of(uri: str) -> str:
    return hashlib.sha256(uri.encode(errors="surrogatepass")).hexdigest()[:32]


def row(uri: str, mask_HW: np.ndarray | None = None, **values: Any) -> dict[str, Any]:
    """A row of a labels table: ``ok`` with a mask, ``fetch`` without."""
    if mask_HW is None:
        return {"id": id_of(uri), "uri": uri, "status": "fetch", "error": f"{uri}: not there", **values}
    kept = mask_HW != 255
    return {
        "id": id_of(uri),
        "uri": uri,
        "status": "ok",
        "height": mask_HW.shape[0],
        "width": mask_HW.shape[1],
        "mask_png": encode_mask(mask_HW),
        "confidence": 0.75 if kept.any() else None,
        "abstained": float(1 - kept.mean()),
        "class_fractions": [0.5, 0.25, 0.25],
        "model_digest": DIGEST,
        **values,
    }


def put_labels(folder: str, rows: Sequence[dict[str, Any]], label_set: LabelSet | None = THREE, shards: int = 2) -> str:
    """Writes rows as shards of a finished labels folder; returns the folder."""
    for i in range(shards):
        table = pa.Table.from_pylist(list(rows[i::shards]), schema=labels_schema(label_set))
        write_table(f"{folder}/part-{i}.parquet", table)
    write_table(f"{folder}/_SUCCESS", table)  # any bytes do
    return folder


def mask(*values: int) -> np.ndarray:
    """A mask of one row."""
    return np.array([values], dtype=np.uint8)
