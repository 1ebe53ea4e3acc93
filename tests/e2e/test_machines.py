"""A cluster of three machines: jobs come to their end when a machine dies, and are refused where one lacks the storage."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raysal.config import ModelConfig
from raysal.datasets.synthetic import write_archive
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch
from tests.e2e.machines import QUICK_DEATH, Machines, cannot, machines

WHY = cannot()
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY or "none")]

MODEL = ModelConfig(arch="Unet", encoder="tu-mobilenetv3_small_050")
SIDE, IMAGES = 64, 240  # and one more, for val
SMALL = ("--set", "runtime.kind=eager", "--set", "score.batch_size=2", "--set", "compute.score_actors=2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with tempfile.TemporaryDirectory(prefix="raysal-machines-") as folder, machines(Path(folder), 3, cpus=3, env=QUICK_DEATH) as made:
        write_archive(str(made.shared / "archive"), IMAGES, 1, SIDE, 0)
        save(str(made.shared / "model"), TwoBranch(MODEL, S5MARS.n_classes, 0), ModelInfo(S5MARS, MODEL, 1.0, SIDE))
        yield made


def masks(folder: Path) -> dict[str, bytes]:
    rows = [row for file in folder.glob("part-*.parquet") for row in pq.read_table(file, columns=["uri", "mask_png"]).to_pylist()]
    found = {Path(row["uri"]).name: row["mask_png"] for row in rows}
    assert len(found) == len(rows), "an image has two masks"
    return found


def test_a_machine_dies_while_it_labels_and_every_image_has_its_mask_once(cluster: Machines) -> None:
    place = (cluster.shared / "model", cluster.shared / "archive" / "images")
    alone = [sys.executable, "-m", "raysal", "label", *map(str, place), "--out", str(cluster.shared / "alone"), *SMALL[:4]]
    subprocess.run(alone, check=True, env=cluster.environment(token=False), stdout=subprocess.DEVNULL)
    out = cluster.shared / "labels"
    job = cluster.submit("label", *place, "--out", out, *SMALL)
    while not list(out.glob("part-*.parquet")):
        assert job.poll() is None and job.stdout is not None, job.stdout.read()
        time.sleep(0.05)
    head = cluster.alive()[cluster.address(0)]
    assert cluster.helpers() == dict.fromkeys(("_StatsActor", "ActorLocationTracker", "_AutoscalingCoordinatorActor"), head), (
        "on a worker they would keep it from going idle, and break every stream when it goes"
    )
    victim = cluster.without_the_job()
    cluster.kill(victim)
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said[-4000:]
    assert masks(out) == masks(cluster.shared / "alone") and len(masks(out)) == IMAGES + 1
    cluster.wait(2)
    assert cluster.address(victim) not in cluster.alive()


def test_a_machine_that_does_not_see_the_storage_stops_a_run_before_it_begins(cluster: Machines) -> None:
    here = 1 if cluster.address(1) in cluster.alive() else 2
    blind = 3 - here
    cluster.kill(blind)
    cluster.wait(2)
    cluster.start(blind, cpus=1, without=[cluster.shared])  # no room for the job's own process
    cluster.wait(3)
    out = cluster.shared / "never"
    job = cluster.submit("label", cluster.shared / "model", cluster.shared / "archive" / "images", "--out", out, *SMALL, "--cpus", "2")
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 2 and "1 of 2 nodes can't see" in said and cluster.address(blind) in said, said[-4000:]
    assert not out.exists()
