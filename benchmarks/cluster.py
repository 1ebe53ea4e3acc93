"""A cluster of three machines that are killed, cut off the network and restarted while submitted jobs run, and what is left of the work.

    python benchmarks/cluster.py                 # as root: each machine is a network namespace, see tests/e2e/machines.py

A head without CPUs and two workers, tokens on, storage that all share; a job's own process is on one worker, and what is killed or cut is
the other one. Every output is compared with one that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from common import Claim, options, write
from parts.killer import masks
from parts.scenes import ENCODER, scenes, untrained

from raysal.archive.tables import read_table
from raysal.train.logs import read_log

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))
from machines import Machines, cannot, machines

PX = 128
QUICK_LOOK = ["--set", "runtime.kind=eager", "--set", "score.batch_size=4", "--set", "compute.score_actors=2"]
TRAIN = {
    "data": {"synthetic": {"images": 48, "val_images": 8, "size_px": 64}},
    "augment": {"crop_px": 64, "scale": [0.8, 1.2]},
    "model": {"arch": "Unet", "encoder": "tu-mobilenetv3_small_050"},
    "optim": {"name": "adamw", "lr": 1e-3},
    "train": {"steps": 120, "batch_labeled": 4, "batch_unlabeled": 4, "checkpoint_every": 10, "eval_every": 0, "log_every": 1},
    "loop": {"initial": 6, "per_round": 3, "rounds": 1},
    "runtime": {"kind": "eager"},
    "compute": {"train_workers": 2, "cpus_per_worker": 2.5, "threads": 1, "max_failures": 5, "in_process": 0},
}
"""Two workers of 2.5 CPUs go to two machines of 4, one of which holds the job's own process too."""


def submit(at: Machines, *arguments: object, meanwhile: Callable[[], None] | None = None) -> str:
    """A submission, and something that happens while its job runs. Returns the log."""
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
    if process.returncode:
        raise RuntimeError(f"submit {arguments[0]} ended with {process.returncode}: {''.join(said)[-4000:]}")
    return "".join(said)


def until(reached: Callable[[], bool], timeout_s: float = 600) -> None:
    end = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError("what should be disturbed never began")
        time.sleep(0.05)


class Trial:
    """What happens to the machine that does not hold the job's own process."""

    def __init__(self, at: Machines) -> None:
        self.at, self.victim = at, 0

    def when(self, reached: Callable[[], bool], act: Callable[[int], None]) -> Callable[[], None]:
        """Does something to it (kills it, cuts it off), once `reached`."""

        def do() -> None:
            until(reached)
            self.victim = self.at.without_the_job()
            act(self.victim)

        return do

    def mend(self) -> None:
        """The machine is as it was."""
        self.at.kill(self.victim)
        self.at.mend(self.victim)
        self.at.wait(2)
        self.at.start(self.victim)
        self.at.wait(3)


def shards(folder: Path, n: int = 1) -> Callable[[], bool]:
    return lambda: len(list(folder.glob("part-*.parquet"))) >= n


def rows(folder: Path) -> dict[str, tuple]:
    """Scores by id, without when they were made. Raises AssertionError where an id is there twice."""
    table = read_table(str(folder), ["id", "status", "entropy", "uncertainty"]).to_pylist()
    found = {r["id"]: (r["status"], r["entropy"], r["uncertainty"]) for r in table}
    assert len(found) == len(table), "an image has two rows"
    return found


def same(found: dict[str, tuple], expected: dict[str, tuple]) -> float:
    """Share of images with the undisturbed row, numbers to within float rounding."""

    def equal(a: tuple, b: tuple) -> bool:
        return all(abs(x - y) <= 1e-5 if isinstance(x, float) and isinstance(y, float) else x == y for x, y in zip(a, b, strict=True))

    assert set(found) <= set(expected), "rows of no image"
    return sum(i in found and equal(found[i], row) for i, row in expected.items()) / len(expected)


def losses(run: Path) -> np.ndarray:
    """Loss by step; where steps were done again, the last time."""
    records = {r["step"]: r["loss"] for r in read_log(str(next(run.rglob("metrics.jsonl")).parent)) if "loss" in r}
    return np.array([records[step] for step in sorted(records)])


def worlds(run: Path) -> list[tuple[int, int]]:
    """(step, workers) at each start of a training."""
    return [(r["start"], r["world"]) for r in read_log(str(next(run.rglob("metrics.jsonl")).parent)) if "start" in r]


def step_of(run: Path) -> int:
    logs = list(run.rglob("metrics.jsonl"))
    return max((r.get("step", 0) for r in read_log(str(logs[0].parent))), default=0) if logs else 0


def labelling(at: Machines, images: int) -> tuple[list[Claim], list[str]]:
    """Scores and masks, undisturbed, with a machine killed, with one cut off, and with the head restarted."""
    trial, folder = Trial(at), at.shared
    model, place = untrained(folder / "model", PX), str(folder / "manifest")
    scenes(folder / "archive", images, PX)
    claims, notes = [], []
    started = time.perf_counter()
    submit(at, "index", folder / "archive" / "images", "--out", place)
    notes.append(f"a job that indexes {images} images took {time.perf_counter() - started:.0f} s from command to end")
    for verb, read in (("score", rows), ("label", masks)):
        plain = [sys.executable, "-m", "raysal", verb, model, place, "--out", str(folder / f"{verb}-alone"), *QUICK_LOOK[:4]]
        plain += ["--set", "compute.in_process=100000"]
        subprocess.run(plain, check=True, env=at.environment(token=False), stdout=subprocess.DEVNULL)
        expected = read(str(folder / f"{verb}-alone"))
        for what, act in (("killed", at.kill), ("cut off the network", at.cut)):
            out = folder / f"{verb}-{what.split()[0]}"
            submit(at, verb, model, place, "--out", out, *QUICK_LOOK, meanwhile=trial.when(shards(out), act))
            trial.mend()
            claims.append(
                Claim(
                    f"{verb}, a worker machine {what}: share of images with the undisturbed row, once",
                    same(read(str(out)), expected),
                    1.0,
                    "higher",
                    "",
                )
            )
            print(claims[-1], flush=True)
    out = folder / "label-head"
    job = at.submit("label", model, place, "--out", out, *QUICK_LOOK, "--no-wait")
    job.wait(300)
    until(shards(out))
    for machine in range(3):
        at.kill(machine)  # without its head a cluster's workers end too, some minutes later
    had = len(masks(str(out)))
    for machine in range(3):
        at.start(machine)
        if machine == 0:
            at.wait(1)
    at.wait(3)
    said = submit(at, "label", model, place, "--out", out, *QUICK_LOOK)
    claims.append(
        Claim(
            "label, the head restarted, the same submission: share of images with the undisturbed row, once",
            same(masks(str(out)), expected),
            1.0,
            "higher",
            "",
        )
    )
    notes.append(
        f"when the head went {had} of {images} images were done; the submission after it did the others: {said.strip().splitlines()[-1]}"
    )
    print(claims[-1], notes[-1], flush=True)
    return claims, notes


def training(at: Machines, steps: int) -> tuple[list[Claim], list[str]]:
    """Two workers on two machines against two on one, then with disturbances, then elastic."""
    trial, folder = Trial(at), at.shared
    claims, notes = [], []

    def config(name: str, **compute: object) -> Path:
        tree = json.loads(json.dumps(TRAIN)) | {"run": str(folder / name)}
        tree["train"]["steps"] = steps
        tree["compute"] |= compute
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    def train(name: str, meanwhile: Callable[[], None] | None = None, **compute: object) -> np.ndarray:
        submit(at, "train", "--config", config(name, **compute), meanwhile=meanwhile)
        return losses(folder / name)

    for name, workers in (("one-machine", 2), ("one-worker", 1)):
        local = ["--set", "compute.cpus_per_worker=1", "--set", "compute.local_cpus=4", "--set", f"compute.train_workers={workers}"]
        command = [sys.executable, "-m", "raysal", "train", "--config", str(config(name)), *local]
        subprocess.run(command, check=True, env=at.environment(token=False), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    here, alone = losses(folder / "one-machine"), losses(folder / "one-worker")
    there = train("two-machines")
    claims.append(
        Claim(
            "training, 2 workers on 2 machines / on 1: largest difference of a step's loss",
            float(np.abs(there - here).max()),
            1e-4,
            "lower",
            "",
        )
    )
    third = len(alone) // 3
    claims.append(
        Claim(
            "training, 2 workers / 1: mean loss of the last third of the steps",
            float(there[-third:].mean() / alone[-third:].mean()),
            None,
            "lower",
            "x",
        )
    )
    print(claims[-2:], flush=True)
    for what, act in (("killed", at.kill), ("cut off the network", at.cut)):
        name = f"train-{what.split()[0]}"

        def back(act: Callable[[int], None] = act, name: str = name) -> None:
            trial.when(lambda: step_of(folder / name) >= steps // 4, act)()
            trial.mend()

        got = train(name, back)
        claims.append(
            Claim(
                f"training, a worker machine {what}: largest difference of a step's loss",
                float(np.abs(got - here).max()),
                1e-4,
                "lower",
                "",
            )
        )
        notes.append(f"{name}: (step, workers) at each start: {worlds(folder / name)}")
        print(claims[-1], notes[-1], flush=True)

    def comes_and_goes() -> None:
        trial.when(lambda: step_of(folder / "elastic") >= steps // 4, at.kill)()
        until(lambda: worlds(folder / "elastic")[-1][1] == 1)
        at.start(trial.victim)
        at.wait(3)

    got = train("elastic", comes_and_goes, min_workers=1, resize_every_s=5)
    seen = [world for _, world in worlds(folder / "elastic")]
    order = [w for k, w in enumerate(seen) if k == 0 or w != seen[k - 1]]
    claims.append(Claim("training, elastic: went from 2 workers to 1 to 2", float(order[:3] == [2, 1, 2]), 1.0, "higher", ""))
    claims.append(
        Claim(
            "training, elastic / undisturbed: mean loss of the last third",
            float(got[-third:].mean() / here[-third:].mean()),
            None,
            "lower",
            "x",
        )
    )
    notes.append(f"elastic: (step, workers) at each start: {worlds(folder / 'elastic')}")
    print(claims[-2:], notes[-1], flush=True)
    return claims, notes


def looping(at: Machines) -> list[str]:
    """The whole loop, from submission to masks of the archive."""
    tree = json.loads(json.dumps(TRAIN)) | {"run": str(at.shared / "loop")}
    tree["train"]["steps"] = 20
    file = at.shared / "loop.yaml"
    file.write_text(yaml.safe_dump(tree))
    began = time.perf_counter()
    said = submit(at, "loop", "--config", file)
    took = f"{time.perf_counter() - began:.0f} s; it says: {said.strip().splitlines()[-2]}"
    return [f"a loop of two rounds on synthetic scenes, from submission to masks: {took}"]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--parts", nargs="+", default=["label", "train", "loop"], choices=["label", "train", "loop"])
    args = parser.parse_args()
    if why := cannot():
        print(f"left out: {why}")
        return
    images, steps = (80, 40) if args.quick else (args.images, args.steps)
    claims, notes = [], []
    with tempfile.TemporaryDirectory(prefix="raysal-cluster-") as name, machines(Path(name), 3, cpus=4) as at:
        if "label" in args.parts:
            more, told = labelling(at, images)
            claims, notes = claims + more, notes + told
        if "train" in args.parts:
            more, told = training(at, steps)
            claims, notes = claims + more, notes + told
        if "loop" in args.parts:
            notes += looping(at)
    about = f"A head and two workers of 4 logical CPUs on {os.cpu_count()} cores; {ENCODER}, {PX} px; Ray's own limits for dead nodes.\n\n"
    write("cluster", "Jobs on machines that die", claims, args.out, about + "\n".join(f"- {note}" for note in notes), {"SCRATCH": name})


if __name__ == "__main__":
    main()
