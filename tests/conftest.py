"""Fixtures for every test."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of real data: ``data/mars``, ``data/ai4mars_sample``, ``data/pds``; the test is skipped without it."""
    named = os.environ.get("RAYSAL_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder}/data is no folder; set RAYSAL_DATA to the folder that holds data/")
    return folder


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh folder that does not exist yet, once on disk and once in an object-like store."""
    return str(tmp_path / "data") if request.param == "local" else f"memory://{uuid.uuid4().hex}/data"
