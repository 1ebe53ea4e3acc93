"""Manifests under hard conditions: runs that are killed at any step, archives far longer than memory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysal.archive.index import index
from raysal.archive.tables import read_table
from raysal.archive.uris import remove_tree
from raysal.errors import InputError
from tests.manifests import fill, record, rows_in, uris

DIE_AT_EACH_STEP = """
import json, os, shutil, signal, sys
import raysal.archive.index as indexing
import raysal.archive.publish as publishing
indexing.SHARD_ROWS = 10
archive, base, folder = sys.argv[1:]

def run(out, steps):
    \"\"\"Indexes in a child that kills itself before it writes, moves or removes for the steps-th time; whether it came to its end.\"\"\"
    child = os.fork()
    if child == 0:
        left = [steps]
        def counted(function):
            def call(*arguments, **more):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **more)
            return call
        indexing.write_table = counted(indexing.write_table)
        for name in ("write_bytes", "move", "remove_tree"):
            setattr(publishing, name, counted(getattr(publishing, name)))
        indexing.index([archive], out, prune=True)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0

steps, ended = 0, False
while not ended:
    out = os.path.join(folder, str(steps))
    if os.path.isdir(base):
        shutil.copytree(base, out)
    ended = run(out, steps)
    steps += 1
print(steps)
"""


@pytest.mark.parametrize("second_run", [False, True])
def test_a_run_killed_at_any_step_and_started_again_leaves_the_manifest_of_an_undisturbed_one(tmp_path: Path, second_run: bool) -> None:
    """Before its plan a killed run has changed nothing; after it, the next run ends it. No row is lost, none is there twice."""
    archive = fill(str(tmp_path / "archive"), *(f"{i:02d}.jpg" for i in range(25)))
    base, tried = tmp_path / "base", tmp_path / "tried"
    tried.mkdir()
    before: list[tuple[str, str]] = []
    if second_run:
        index([archive], str(base))
        before = rows_in(base)
        fill(archive, "07.jpg", *(f"9{i}.jpg" for i in range(12)), data=b"more")
        remove_tree(f"{archive}/21.jpg")
    done = subprocess.run(
        [sys.executable, "-c", DIE_AT_EACH_STEP, archive, str(base), str(tried)], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    undisturbed = rows_in(tried / str(steps - 1))
    assert len(undisturbed) == (36 if second_run else 25) and steps > 8
    untouched = 0
    for step in range(steps - 1):
        killed = tried / str(step)
        if not (killed / "_PLAN.json").exists() and not (killed / "_INDEX.json").exists():
            assert not list(killed.glob("part-*")), "nothing is visible of a manifest that is not whole"
        elif not (killed / "_PLAN.json").exists() and rows_in(killed) == before:
            untouched += 1
        index([archive], str(killed), prune=True)
        assert rows_in(killed) == undisturbed, f"killed before step {step}"
        assert sorted(p.name for p in killed.iterdir() if p.name != ".lock") == sorted(["_INDEX.json", *record(str(killed))["shards"]])
    assert untouched >= 3 or not second_run


def test_a_killed_process_leaves_no_half_manifest(tmp_path: Path) -> None:
    """The command itself, killed while it writes shards."""
    (tmp_path / "l.txt").write_text("".join(f"s3://b/sol/{i // 100:05d}/{i:06d}.jpg\n" for i in range(30_000)))
    out = tmp_path / "m"
    program = f"import raysal.archive.index as i; i.SHARD_ROWS = 200; print(i.index([{str(tmp_path / 'l.txt')!r}], {str(out)!r}).rows)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "_new-part-0000-00005.parquet").exists():
        assert process.poll() is None, f"ended before it could be killed: {process.stderr.read() if process.stderr else ''}"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(InputError, match="holds no Parquet file"):
        read_table(str(out))
    summary = index([str(tmp_path / "l.txt")], str(out))
    assert (summary.rows, summary.new) == (30_000, 30_000)
    assert uris(str(out)) == [line for line in (tmp_path / "l.txt").read_text().split()]
    assert not [p for p in out.iterdir() if p.name.startswith("_new")]


MEASURE = """
import sys
from raysal.archive.index import index
for expected in (True, False):
    summary = index([sys.argv[1]], sys.argv[2])
    assert (summary.new > 0) is expected
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process as Linux tells it")
def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    """Peak of a process that indexes and indexes again: 100,000 more rows would be over 66 MB as Python objects."""
    peak_mb = {}
    for rows in (20_000, 120_000):
        lines = (f"https://host/sol/{i // 200:05d}/NLB_{i:09d}EDR_F{i // 9000:03d}{i % 9000:04d}NCAM00253M1.JPG\n" for i in range(rows))
        (tmp_path / f"{rows}.txt").write_text("".join(lines))
        command = [sys.executable, "-c", MEASURE, str(tmp_path / f"{rows}.txt"), str(tmp_path / str(rows))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr
        peak_mb[rows] = int(done.stdout) / 1024
    assert peak_mb[120_000] - peak_mb[20_000] < 33, peak_mb
