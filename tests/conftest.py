"""Fixtures for every test."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from hypothesis import HealthCheck, settings

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")  # timing never decides a test

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


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[None]:
    """Eight logical CPUs whatever the machine has: pipelines of several stages must not wait for each other."""
    ray.init(num_cpus=8, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def raysal(ray_runtime: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Calls ``raysal ARGUMENTS`` in this process, through its entry point, on the runtime that is up: seconds faster than a new process."""
    from raysal.cli import main

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["raysal", *arguments])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return Said(code, out, err)

    return call
