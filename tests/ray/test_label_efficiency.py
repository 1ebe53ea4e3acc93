"""The label-efficiency benchmark on a real Ray: killed half-way, it goes on and repeats nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raysal.datasets.synthetic import write_archive
from tests.helpers import kill_when

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "label_efficiency.py"
pytestmark = pytest.mark.skipif(not PROGRAM.is_file(), reason="benchmarks/ is part of a checkout only")


def test_killed_half_way_it_repeats_no_training(tmp_path: Path) -> None:
    write_archive(str(tmp_path / "data"), 40, 4, 32, 0)
    cache = tmp_path / "cache"
    command = [sys.executable, str(PROGRAM), "--quick", "--data", str(tmp_path / "data"), "--cache", str(cache), "--out", str(tmp_path)]
    command += ["--rows", "Random", "UEQ, 1 round", "--set", "data.label_set=s5mars", "--set", "model.encoder=tu-mobilenetv3_small_050"]

    def trainings() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in cache.glob("training-*.json")}

    kill_when(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), lambda: bool(trainings()))
    kept = trainings()

    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    after = trainings()
    assert len(after) == 3, "a shared start and one training a row"
    assert {name: when for name, when in after.items() if name in kept} == kept, "a finished training was done again"
    assert "| UEQ, 1 round | 2 |" in done.stdout and "classes not seen" in done.stdout
