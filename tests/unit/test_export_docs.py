"""What docs/export.md shows is run, in order, in a folder with a small run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.exports import put_labels, row

PAGE = (Path(__file__).resolve().parents[2] / "docs/export.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^<!-- test -->\n+```(bash|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LIBRARIES = ("pycocotools", "datasets")


def test_every_marked_block_is_found() -> None:
    assert len(BLOCKS) == PAGE.count("<!-- test -->") == 4


def test_the_pages_commands_and_programs_run(tmp_path: Path) -> None:
    for library in LIBRARIES:
        pytest.importorskip(library)
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(tmp_path / f"images/{name}.jpg")
        rows.append(row(f"{tmp_path}/images/{name}.jpg", rng.choice([0, 1, 255], (12, 16)).astype(np.uint8)))
    put_labels(str(tmp_path / "runs/demo/labels"), rows)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    for language, text in BLOCKS:
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-W", "ignore", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
