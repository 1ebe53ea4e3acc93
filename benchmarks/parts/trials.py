"""What is done to a cluster of several machines while a submitted job runs, and how its results are compared with undisturbed ones."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from raysal.archive.tables import read_table
from raysal.archive.uris import join, list_names
from raysal.train.logs import read_log

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "e2e"))
from machines import Machines

Act = Callable[[], None]
Reached = Callable[[], bool]

HEADLESS_S = 600.0
"""Within which the workers of a head that is gone must have ended."""


def until(reached: Reached, timeout_s: float = 600) -> None:
    """Waits for a moment of a job. Raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for never came")
        time.sleep(0.05)


def submit(at: Machines, *arguments: object, meanwhile: Act | None = None, fails: bool = False) -> str:
    """A submission, and something that happens while its job runs. Returns what it says; raises RuntimeError where it ends otherwise."""
    process = at.submit(*arguments)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()))
    reader.start()
    try:
        if meanwhile is not None:
            meanwhile()
    finally:
        process.wait(1800)
        reader.join()
    if bool(process.returncode) != fails:
        raise RuntimeError(f"submit {arguments[0]} ended with {process.returncode}: {''.join(said)[-4000:]}")
    return "".join(said)


class Trial:
    """A machine that something happens to, and what becomes of it afterwards."""

    def __init__(self, at: Machines) -> None:
        self.at, self.victim, self.headless_s = at, 0, 0.0

    def other(self, reached: Reached, act: Callable[[int], None]) -> Act:
        """Does something to the worker machine without the job's own process (kills it, cuts it off), once `reached`."""

        def do() -> None:
            until(reached)
            self.victim = self.at.without_the_job()
            act(self.victim)

        return do

    def own(self, reached: Reached) -> Act:
        """Kills the machine of the job's own process, once `reached`."""

        def do() -> None:
            until(reached)
            self.victim = 3 - self.at.without_the_job()
            self.at.kill(self.victim)

        return do

    def head(self, reached: Reached) -> Act:
        """Kills the head, once `reached`, waits for the workers to end by themselves, and starts a new one with new workers."""

        def do() -> None:
            until(reached)
            began = time.monotonic()
            self.at.kill(0)
            until(lambda: not self.at.pids(1) and not self.at.pids(2), HEADLESS_S)
            self.headless_s = time.monotonic() - began
            for machine in range(3):
                self.at.start(machine)
                self.at.wait(machine + 1)

        return do

    def mend(self) -> None:
        """The machine is as it was."""
        self.at.kill(self.victim)
        self.at.mend(self.victim)
        self.at.wait(2)
        self.at.start(self.victim)
        self.at.wait(3)


def shards(out: str, n: int = 1) -> Reached:
    """Whether an output holds so many shards."""
    return lambda: sum(name.startswith("part-") for name in list_names(out)) >= n


def rows(out: str) -> dict[str, tuple]:
    """Scores by id, without when they were made. Raises AssertionError where an id is there twice."""
    table = read_table(out, ["id", "status", "entropy", "uncertainty"]).to_pylist()
    found = {r["id"]: (r["status"], r["entropy"], r["uncertainty"]) for r in table}
    assert len(found) == len(table), "an image has two rows"
    return found


def same(found: dict[str, tuple], expected: dict[str, tuple]) -> float:
    """Share of images with the undisturbed row, numbers to within float rounding."""

    def equal(a: tuple, b: tuple) -> bool:
        return all(abs(x - y) <= 1e-5 if isinstance(x, float) and isinstance(y, float) else x == y for x, y in zip(a, b, strict=True))

    assert set(found) <= set(expected), "rows of no image"
    return sum(i in found and equal(found[i], row) for i, row in expected.items()) / len(expected)


def losses(run: str) -> np.ndarray:
    """Loss of a training by step."""
    records = {r["step"]: r["loss"] for r in read_log(join(run, "train")) if "loss" in r}
    return np.array([records[step] for step in sorted(records)])


def worlds(run: str) -> list[tuple[int, int]]:
    """(step, workers) at each start of a training."""
    return [(r["start"], r["world"]) for r in read_log(join(run, "train")) if "start" in r]


def step_of(run: str) -> int:
    """The last step that a training has told of."""
    return max((r.get("step", 0) for r in read_log(join(run, "train"))), default=0)
