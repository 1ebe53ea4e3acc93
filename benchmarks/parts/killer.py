"""A command on a cluster of two nodes, killed at random moments, and whether its output is that of nobody's disturbance."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
from ray.cluster_utils import Cluster

from raysal.archive.tables import read_table

KINDS = ("driver", "actor", "node")

LONGEST_PAUSE_S = 40.0
"""Between two kills, at most: longer than a driver and its actors take to start, and than a block of images takes."""


class Killer:
    """A cluster of two nodes, a command that works on it, and ways to kill each of them.

    Args:
        arguments: The command, without the cluster's address.
        seed: Of the moments.
    """

    def __init__(self, arguments: list[str], seed: int) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
        self.second = self.cluster.add_node(num_cpus=4)
        address = ["--set", f"compute.address={json.dumps(self.cluster.address)}"]
        self.command = [sys.executable, "-m", "raysal", *arguments, *address]
        self.random, self.driver = random.Random(seed), None
        self.starts = 0

    def work(self) -> None:
        """Gives the command unless it is at work."""
        if self.driver is None or self.driver.poll() is not None:
            self.driver = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            self.starts += 1

    def kill(self, kind: str) -> bool:
        """Kills at any moment of the work, its start and its end included; whether there was something to kill."""
        self.work()
        moment = time.monotonic() + self.random.uniform(0, LONGEST_PAUSE_S)
        if not self._wait(lambda: time.monotonic() > moment and (kind != "actor" or self._actors())):
            return False
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
        elif kind == "node":
            self.cluster.remove_node(self.second, allow_graceful=False)
            self.second = self.cluster.add_node(num_cpus=4)
        else:
            with contextlib.suppress(ProcessLookupError, IndexError):  # it ended this moment
                os.kill(self.random.choice(self._actors()).pid, signal.SIGKILL)
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

    def _actors(self) -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if "MapWorker" in _name(p)]

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


def killed(killer: Killer, kills: int) -> list[str]:
    """Kills so many times, each kind at least once, then lets the command end. Returns what was killed."""
    try:
        plan = [*KINDS, *(killer.random.choice(KINDS) for _ in range(kills - len(KINDS)))]
        killer.random.shuffle(plan)
        done = [kind for kind in plan if killer.kill(kind)]
        killer.finish()
        return done
    finally:
        killer.close()


def masks(folder: str) -> dict[str, tuple]:
    """By id: status, mask and digest of the source. Raises AssertionError where an id has two rows."""
    rows = read_table(folder, ["id", "status", "mask_png", "source_sha256"]).to_pylist()
    found = {row["id"]: (row["status"], row["mask_png"], row["source_sha256"]) for row in rows}
    assert len(found) == len(rows), "an image has two rows"
    return found
