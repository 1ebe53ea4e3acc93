"""Benchmarks: what they leave names no path of the machine, and `make bench` ends without data that nobody has."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks/ is part of a checkout only")


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("common")


@pytest.fixture
def marsscapes(common: ModuleType) -> ModuleType:
    return importlib.import_module("marsscapes_loop")


def test_absolute_and_leaving_paths_become_words(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    places = {"DATA": "../sets/mars & co", "WEIGHTS": f"{tmp_path}/w.safetensors", "RUN": "runs/x"}
    text = f"root: ../sets/mars & co\n<a>{tmp_path}/sets/mars &amp; co/images/1.jpg</a> 'file://{home}/runs/x' {tmp_path}/w.safetensors"
    assert common.scrub(text, places) == "root: DATA\n<a>DATA/images/1.jpg</a> 'RUN' WEIGHTS"


def test_what_lies_inside_another_place_keeps_its_own_word(common: ModuleType) -> None:
    assert common.scrub("/a/b/run/x /a/b/c", {"DATA": "/a/b", "RUN": "/a/b/run/"}) == "RUN/x DATA/c"


def test_pictures_are_left_as_they_are(common: ModuleType) -> None:
    picture = "data:image/png;base64,iVBO/abc/9j+/abc="
    assert common.scrub(f'<img src="{picture}"> /abc/x', {"DATA": "/abc"}) == f'<img src="{picture}"> DATA/x'


def test_a_path_that_would_stay_is_refused(common: ModuleType) -> None:
    with pytest.raises(ValueError, match="/secret/place"):
        common.scrub("-I/secret/place", {"DATA": "/secret/place"})


def test_the_repository_itself_is_never_named(common: ModuleType) -> None:
    assert common.scrub(f"{ROOT}/configs/demo.yaml", {}) == "REPOSITORY/configs/demo.yaml"


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("/some/abs/path", "path"),
        ("data.root=/some/abs/path", "data.root=path"),
        ("data.root='/some/abs/path'", "data.root='path'"),
        ("--images=../sets/mars", "--images=mars"),
        ("~/sets/mars", "mars"),
        ("configs/demo.yaml", "configs/demo.yaml"),
        ("train.steps=4", "train.steps=4"),
        ("data.root=s3://bucket/mars", "data.root=s3://bucket/mars"),
    ],
)
def test_a_command_shows_only_the_last_part_of_a_path(common: ModuleType, argument: str, wanted: str) -> None:
    assert common.shown(argument) == wanted


def test_a_result_names_no_place(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(tmp_path / "mars")
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/loop.py", "--data", data, "--set", f"data.root={data}"])
    claim = common.Claim("a ratio", 1.0, 0.9, "higher", "x")
    common.write("loop", "Loop", [claim], tmp_path / "out", f"from {data}/images", {"DATA": data})
    command = "python loop.py --data DATA --set data.root=DATA"
    assert json.loads((tmp_path / "out/loop.json").read_text())[0]["command"] == command
    table = (tmp_path / "out/loop.md").read_text()
    assert command in table and "from DATA/images" in table and str(tmp_path) not in table


def test_a_kept_report_names_no_place(marsscapes: ModuleType, whole: Path, tmp_path: Path) -> None:
    before = (whole / "report/index.html").read_text()
    assert str(whole) in before
    rounds = marsscapes.keep(whole, whole / "report/index.html", tmp_path, {"DATA": str(whole / "data"), "RUN": str(whole)})
    assert [m["round"] for m in rounds] == [0, 1]
    kept = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(kept) == {"metrics-round-0.json", "metrics-round-1.json", "report.html"}
    assert all(str(whole) not in text for text in kept.values())
    assert "DATA/images/" in kept["report.html"]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """An environment whose python only says what it is called with, and fails for the program named in FAILS."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho "ran $*"\ntest "$1" != "$FAILS"\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    return tmp_path


def make(environment: Path, *arguments: str, fails: str = "") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")} | {"FAILS": fails}
    command = ["make", "-C", str(ROOT), "bench", f"VENV={environment}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)


def test_make_bench_leaves_out_what_needs_data_and_says_so(bench: Path) -> None:
    done = make(bench, "ARGS=--quick")
    assert done.returncode == 0, done.stderr
    ran = [line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")]
    programs = {f"benchmarks/{file.name}" for file in (ROOT / "benchmarks").glob("[a-z]*.py")}
    on_tiles = ("benchmarks/marsscapes_loop.py", "benchmarks/audit.py", "benchmarks/archive.py", "benchmarks/label_efficiency.py")
    assert set(ran) == {f"{p} --quick" for p in programs - {"benchmarks/common.py", *on_tiles}}
    assert f"left out: {' '.join(on_tiles)}" in done.stdout and "DATA=" in done.stdout


def test_make_bench_runs_the_real_tiles_where_they_are_given(bench: Path) -> None:
    done = make(bench, "DATA=/a b/mars", "WEIGHTS=w.safetensors")
    for program in ("marsscapes_loop", "audit", "archive", "label_efficiency"):
        assert f"ran benchmarks/{program}.py --data /a b/mars --weights w.safetensors" in done.stdout
    assert "left out" not in done.stdout


def test_make_bench_goes_on_after_a_failure_and_ends_with_it(bench: Path) -> None:
    done = make(bench, fails="benchmarks/demo.py")
    assert done.returncode != 0 and "failed: benchmarks/demo.py" in done.stderr
    assert "ran benchmarks/train_step.py" in done.stdout
