"""Benchmarks of the endpoint: what they count as wrong, and that they do not claim what they did not see."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from raysal.serving.problems import TYPE

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks/ is part of a checkout only")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def parts() -> ModuleType:
    return importlib.import_module("parts.endpoint")


def test_an_endpoint_that_does_not_start_is_told_with_its_reason(
    parts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'port 8000 is taken' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(SystemExit, match=r"ended with status 2.*port 8000 is taken"), parts.endpoint("checkpoint"):
        pass


def test_images_that_are_made_later_are_others(parts: ModuleType, tmp_path: Path) -> None:
    files = parts.pictures(tmp_path / "images", 30, 32) + parts.pictures(tmp_path / "images", 30, 32, first=30)
    assert len({file.read_bytes() for file in files}) == len({file.name for file in files}) == 60


def test_only_documented_answers_that_say_what_to_do_are_right() -> None:
    hostile = importlib.import_module("hostile")
    waits = f"{hostile.UNFINISHED} /docs"
    right = [
        ("a", 200, "image/png"),
        ("a", 422, TYPE),
        ("a", 400, "text/plain; charset=utf-8"),
        ("a", 0, ""),
        (waits, 405, TYPE),
        (waits, 401, TYPE),
    ]
    wrong = [("a", 500, TYPE), ("a", 403, TYPE), ("a", 431, TYPE), ("a", 422, "text/plain"), ("a", 413, ""), (waits, 408, TYPE)]
    assert [hostile.fault(*case) for case in right] == [None] * len(right)
    assert all(hostile.fault(*case) for case in wrong)


def test_a_swap_that_nobody_saw_is_not_claimed(parts: ModuleType) -> None:
    hot_swap = importlib.import_module("hot_swap")

    def seen(*digests: str) -> object:
        return hot_swap.Load([parts.Answer(float(k), 0.1, 200, None, digest) for k, digest in enumerate(digests)], 1.5, 2.5)

    hot_swap.check_swapped(seen("old", "old", "new", "new"), "old", "new")
    for digests in (("old",) * 4, ("new",) * 4, ("old", "old", "new"), ("old", "new", "new", "old")):
        with pytest.raises(SystemExit, match="no swap was seen"):
            hot_swap.check_swapped(seen(*digests), "old", "new")
