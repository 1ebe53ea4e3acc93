"""Labeling that is killed again and again against labeling that nobody disturbs: every image once, the same masks.

    python benchmarks/resume.py

A cluster of two nodes (two raylets on this machine) labels synthetic scenes. At random moments one of these dies by SIGKILL: the driver
(the command is then given again), a model actor, or the second node (another one joins). The output is compared with an undisturbed one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from common import Claim, options, write
from parts.scenes import ENCODER, manifest, scenes, untrained
from ray.cluster_utils import Cluster

from raysal.archive.tables import read_table

KINDS = ("driver", "actor", "node")


class Killer:
    """A cluster of two nodes, a command that works on it, and ways to kill each of them.

    Args:
        arguments: The command, without the cluster's address.
        shards: Folder in which its finished work appears.
        seed: Of the moments.
    """

    def __init__(self, arguments: list[str], shards: Path, seed: int) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
        self.second = self.cluster.add_node(num_cpus=4)
        address = ["--set", f"compute.address={json.dumps(self.cluster.address)}"]
        self.command = [sys.executable, "-m", "raysal", *arguments, *address]
        self.shards, self.random, self.driver = shards, random.Random(seed), None
        self.starts = 0

    def work(self) -> None:
        """Gives the command unless it is at work."""
        if self.driver is None or self.driver.poll() is not None:
            self.driver = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            self.starts += 1

    def kill(self, kind: str) -> bool:
        """Lets some shards be finished and kills; whether there was something to kill."""
        self.work()
        before, more = self._done(), self.random.randint(1, 4)
        if not self._wait(lambda: self._done() >= before + more):
            return False
        time.sleep(self.random.random() * 0.3)
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
        elif kind == "node":
            self.cluster.remove_node(self.second, allow_graceful=False)
            self.second = self.cluster.add_node(num_cpus=4)
        else:
            actors = [p for p in psutil.Process().children(recursive=True) if "MapWorker" in _name(p)]
            os.kill(self.random.choice(actors).pid, signal.SIGKILL)
        return True

    def finish(self) -> None:
        """Works to the end; a driver that gave up is started again, three times at most."""
        for _ in range(3):
            self.work()
            _, said = self.driver.communicate(timeout=900)
            if self.driver.returncode == 0:
                return
        raise RuntimeError(f"the command does not come to its end: {said[-2000:]}")

    def close(self) -> None:
        self.cluster.shutdown()

    def _done(self) -> int:
        return len(list(self.shards.glob("part-*.parquet")))

    def _wait(self, reached: Callable[[], bool], timeout_s: float = 300) -> bool:
        deadline = time.monotonic() + timeout_s
        while not reached():
            if self.driver.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def masks(folder: Path) -> dict[str, tuple]:
    """By id: status, mask and digest of the source. Raises AssertionError where an id has two rows."""
    rows = read_table(str(folder), ["id", "status", "mask_png", "source_sha256"]).to_pylist()
    found = {row["id"]: (row["status"], row["mask_png"], row["source_sha256"]) for row in rows}
    assert len(found) == len(rows), "an image has two rows"
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, kills = (120, 3) if args.quick else (args.images, args.kills)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        checkpoint, place = (
            untrained(scratch / "checkpoint", 128),
            manifest(scratch / "manifest.parquet", scenes(scratch / "archive", images, 128)),
        )
        settings = ["--set", "compute.score_actors=2", "--set", "score.batch_size=4"]
        alone = ["label", checkpoint, place, "--out", str(scratch / "alone"), *settings]
        subprocess.run([sys.executable, "-m", "raysal", *alone], check=True, stdout=subprocess.DEVNULL)
        killer = Killer(["label", checkpoint, place, "--out", str(scratch / "killed"), *settings], scratch / "killed", args.seed)
        try:
            plan = [*KINDS, *(killer.random.choice(KINDS) for _ in range(kills - len(KINDS)))]
            killer.random.shuffle(plan)
            done = [kind for kind in plan if killer.kill(kind)]
            killer.finish()
        finally:
            killer.close()
        expected, found = masks(scratch / "alone"), masks(scratch / "killed")
    same = sum(found.get(i) == row for i, row in expected.items())
    claims = [
        Claim(
            f"share of {images} images with the undisturbed row, once each, after {len(done)} kills",
            same / len(expected),
            1.0,
            "higher",
            "",
        ),
        Claim("rows of no image, or of an image a second time", len(found) - same, 0, "lower", ""),
        Claim("kills by SIGKILL while work went on", len(done), float(kills), "higher", ""),
    ]
    counted = ", ".join(f"{n} x {kind}" for kind, n in sorted(Counter(done).items()))
    notes = f"Killed: {counted}. The command was given {killer.starts} times. {images} scenes of 128 px, {ENCODER}, two actors, two nodes."
    write("resume", "Labeling, killed and resumed", claims, args.out, notes)


if __name__ == "__main__":
    main()
