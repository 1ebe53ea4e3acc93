"""A file that changed is labelled again; its old row stays in the table, and out of exports."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raysal.export.run import export_labels
from tests.unit.exports import mask, put_labels, row


def test_of_a_file_that_was_labelled_again_the_newest_mask_is_exported(tmp_path: Path) -> None:
    """Also where the newest try failed: the old mask is that of another picture."""

    def at(day: int, uri: str, mask_HW: np.ndarray | None) -> dict[str, Any]:
        made = row(uri, mask_HW, labeled_at=datetime(2026, 1, day, tzinfo=timezone.utc))
        return made | {"id": f"{day:032x}"}

    rows = [at(1, "/m/a.jpg", mask(0)), at(3, "/m/a.jpg", mask(1)), at(2, "/m/a.jpg", mask(2))]
    rows += [at(4, "/m/b.jpg", mask(0)), at(5, "/m/b.jpg", None), at(6, "/m/c.jpg", mask(2))]
    found = export_labels(put_labels(str(tmp_path / "labels"), rows), "png", str(tmp_path / "out"))
    assert (found.written, found.left_out) == (2, {"fetch": 1, "superseded": 3})
    masks = {p.name: np.array(Image.open(p)).tolist() for p in (tmp_path / "out" / "masks").iterdir()}
    assert masks == {"a.png": [[1]], "c.png": [[2]]}
