"""A cluster of three machines that are killed, cut off the network and restarted while submitted jobs run, and what is left of the work.

    python benchmarks/cluster.py --data TILES     # as root: each machine is a network namespace, see tests/e2e/machines.py

A head without CPUs and two workers, tokens on, storage that all share, and an S3 server. Every output is compared with one that nobody
disturbed. TILES is MarsScapes in raysal's folder layout, for a loop on real images; without it that one is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import yaml
from common import Claim, options, write
from parts.killer import masks
from parts.scenes import ENCODER, scenes, untrained
from parts.trials import Trial, losses, rows, same, shards, step_of, submit, until, worlds

from raysal.archive.tables import read_table
from raysal.archive.uris import join

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))
from machines import Machines, cannot, machines

PX = 128
STORE = "s3://mission"
SETTINGS = ["--set", "runtime.kind=eager", "--set", "score.batch_size=4"]
ACTORS = ["--set", "compute.score_actors=2"]
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


def alone(at: Machines, *arguments: object) -> float:
    """A command on this machine, without the cluster; its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "raysal", *map(str, arguments)]
    subprocess.run(command, check=True, env=at.environment(token=False), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


class Told:
    """Claims and notes as they come: a run takes most of an hour."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.notes: list[str] = []

    def whole(self, what: str, share: float) -> None:
        self.claim(f"{what}: share of images with the undisturbed row, once", share, 1.0, "higher")

    def claim(self, *about: Any) -> None:
        self.claims.append(Claim(*about, ""))
        print(self.claims[-1], flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)


def labelling(at: Machines, images: int, told: Told) -> None:
    """Scores and masks with a machine killed, one cut off, the job's own machine killed, the head restarted, and all on S3."""
    trial, folder = Trial(at), at.shared
    model, place = untrained(folder / "model", PX), str(folder / "manifest")
    scenes(folder / "archive", images, PX)
    archive = folder / "archive" / "images"
    began = time.perf_counter()
    submit(at, "index", archive, "--out", place)
    more = time.perf_counter() - began - alone(at, "index", archive, "--out", folder / "manifest-alone")
    told.claim(f"submitting a job that indexes {images} images: seconds beyond the same command alone", more, None, "lower")
    verbs: tuple[tuple[str, Callable[[str], dict]], ...] = (("score", rows), ("label", masks))
    for verb, read in verbs:
        alone(at, verb, model, place, "--out", folder / f"{verb}-alone", *SETTINGS, "--set", "compute.in_process=100000")
        expected = read(str(folder / f"{verb}-alone"))
        for what, act in (("killed", at.kill), ("cut off the network", at.cut)):
            out = str(folder / f"{verb}-{what.split()[0]}")
            submit(at, verb, model, place, "--out", out, *SETTINGS, *ACTORS, meanwhile=trial.other(shards(out), act))
            trial.mend()
            told.whole(f"{verb}, a worker machine {what}", same(read(out), expected))
    for what, how in (("the job's own machine killed", trial.own), ("the head killed and restarted", trial.head)):
        out = str(folder / f"label-{what.split()[1]}")
        submit(at, "label", model, place, "--out", out, *SETTINGS, *ACTORS, meanwhile=how(shards(out)), fails=True)
        if how == trial.own:
            trial.mend()
        had = len(masks(out))
        said = submit(at, "label", model, place, "--out", out, *SETTINGS, *ACTORS)
        told.whole(f"label, {what}, the same submission again", same(masks(out), expected))
        told.note(f"{what}: {had} of {images} images were done; the same submission did the others: {said.strip().splitlines()[-1]}")
    told.note(f"the workers of a head that is gone ended {trial.headless_s:.0f} s later")
    files = fsspec.filesystem("s3")
    files.put(model, f"{STORE}/model", recursive=True)
    files.put(str(archive), f"{STORE}/raw", recursive=True)
    submit(at, "index", f"{STORE}/raw", "--out", f"{STORE}/manifest")
    out = f"{STORE}/labels"
    there = ("label", f"{STORE}/model", f"{STORE}/manifest", "--out", out)
    submit(at, *there, *SETTINGS, *ACTORS, meanwhile=trial.other(shards(out), at.kill))
    trial.mend()
    by_name = {named(out)[i]: mask for i, mask in masks(out).items()}
    here = named(str(folder / "label-alone"))
    told.whole("label from S3 to S3, a worker machine killed", same(by_name, {here[i]: mask for i, mask in expected.items()}))
    grows(at, trial, model, place, expected, told)


def named(labels: str) -> dict[str, str]:
    """File names by id."""
    return {row["id"]: row["uri"].rpartition("/")[2] for row in read_table(labels, ["id", "uri"]).to_pylist()}


def grows(at: Machines, trial: Trial, model: str, place: str, expected: dict[str, tuple], told: Told) -> None:
    """Labelling that begins on one machine and gets actors on another that comes."""
    out = str(at.shared / "label-grows")
    trial.victim = 2
    at.kill(2)
    at.wait(2)

    def comes() -> None:
        until(shards(out))
        at.start(2)
        at.wait(3)

    submit(at, "label", model, place, "--out", out, *SETTINGS, *ACTORS, "--set", "compute.min_actors=1",
           "--set", "compute.cpus_per_actor=2", meanwhile=comes)  # fmt: skip
    told.whole("label, begun on one machine, another comes", same(masks(out), expected))


def training(at: Machines, steps: int, told: Told) -> None:
    """Two workers on two machines against two on one, then with disturbances, on shared storage and on S3, then elastic."""
    trial, folder = Trial(at), at.shared

    def config(run: str, name: str, times: int = 1, **compute: object) -> Path:
        tree = json.loads(json.dumps(TRAIN)) | {"run": run}
        tree["train"]["steps"] = times * steps
        tree["compute"] |= compute
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    def difference(what: str, found: np.ndarray) -> None:
        told.claim(f"training, {what}: largest difference of a step's loss", float(np.abs(found - here).max()), 1e-4, "lower")

    for name, workers in (("one-machine", 2), ("one-worker", 1)):
        local = {"cpus_per_worker": 1, "local_cpus": 4, "train_workers": workers}
        alone(at, "train", "--config", config(str(folder / name), name, **local))
    here, one = losses(str(folder / "one-machine")), losses(str(folder / "one-worker"))
    run = str(folder / "two-machines")
    submit(at, "train", "--config", config(run, "two-machines"))
    difference("2 workers on 2 machines / on 1", losses(run))
    third = len(one) // 3
    ratio = float(losses(run)[-third:].mean() / one[-third:].mean())
    told.claim("training, 2 workers / 1: mean loss of the last third of the steps", ratio, None, "lower")
    for base, where in ((str(folder), ""), (STORE, " on S3")):
        for what, act in (("killed", at.kill), ("cut off the network", at.cut)):
            name = f"train-{what.split()[0]}"
            run = join(base, name)
            if where and act == at.cut:
                continue  # what differs is the storage, and a kill shows it

            def lost(act: Callable[[int], None] = act, run: str = run) -> None:
                trial.other(lambda: step_of(run) >= steps // 4, act)()
                trial.mend()

            submit(at, "train", "--config", config(run, name + where.replace(" ", "-")), meanwhile=lost)
            difference(f"a worker machine {what}{where}", losses(run))
            told.note(f"{name}{where}: (step, workers) at each start: {worlds(run)}")
    run = str(folder / "train-head")
    file = config(run, "train-head")
    submit(at, "train", "--config", file, meanwhile=trial.head(lambda: step_of(run) >= steps // 4), fails=True)
    submit(at, "train", "--config", file)
    difference("the head killed and restarted, the same submission again", losses(run))
    told.note(f"train-head: (step, workers) at each start: {worlds(run)}")
    elastic(at, trial, partial(config, str(folder / "elastic"), "elastic"), steps, told)


def elastic(at: Machines, trial: Trial, config: Callable[..., Path], steps: int, told: Told) -> None:
    """A machine goes, training goes on with one worker; it comes back, and there are two again. Longer: a machine takes a while to come."""
    run = str(at.shared / "elastic")

    def comes_and_goes() -> None:
        trial.other(lambda: step_of(run) >= steps // 4, at.kill)()
        until(lambda: worlds(run)[-1][1] == 1)
        at.start(trial.victim)
        at.wait(3)

    submit(at, "train", "--config", config(times=3, min_workers=1, resize_every_s=5), meanwhile=comes_and_goes)
    seen = [world for start, world in worlds(run) if start < 3 * steps]  # one that begins at the last step does none
    order = [w for k, w in enumerate(seen) if k == 0 or w != seen[k - 1]]
    told.claim("training, elastic: went from 2 workers to 1 to 2", float(order[:3] == [2, 1, 2]), 1.0, "higher")
    told.note(f"elastic: (step, workers) at each start: {worlds(run)}")


def looping(at: Machines, tiles: str | None, told: Told) -> None:
    """The whole loop, from submission to masks of the archive, on synthetic scenes and on real tiles."""
    tree = json.loads(json.dumps(TRAIN)) | {"run": str(at.shared / "loop")}
    tree["train"]["steps"] = 20
    trees = {"synthetic scenes": tree}
    if tiles is not None:
        real = yaml.safe_load((Path(__file__).resolve().parents[1] / "configs" / "marsscapes.yaml").read_text())
        real |= {"run": f"{STORE}/marsscapes", "compute": TRAIN["compute"], "runtime": {"kind": "eager"}}
        real["data"]["root"] = str(Path(tiles).resolve())
        real["train"] |= {"steps": 40, "checkpoint_every": 20}
        trees["MarsScapes tiles, run folder on S3, 40 steps a round"] = real
    for n, (what, tree) in enumerate(trees.items()):
        file = at.shared / f"loop-{n}.yaml"
        file.write_text(yaml.safe_dump(tree))
        began = time.perf_counter()
        said = submit(at, "loop", "--config", file)
        end = [line for line in said.strip().splitlines() if "masks" in line][-1:]
        labelled = len(masks(join(tree["run"], "labels")))
        told.claim(f"a loop of two rounds on {what}: images with masks at its end", labelled, 1, "higher")
        told.note(f"that loop took {time.perf_counter() - began:.0f} s from submission to masks; it says: {' '.join(end).strip()}")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--data", help="MarsScapes tiles in raysal's folder layout")
    parser.add_argument("--parts", nargs="+", default=["label", "train", "loop"], choices=["label", "train", "loop"])
    args = parser.parse_args()
    if why := cannot():
        print(f"left out: {why}")
        return
    images, steps = (80, 40) if args.quick else (args.images, args.steps)
    told = Told()
    with tempfile.TemporaryDirectory(prefix="raysal-cluster-") as name, machines(Path(name), 3, cpus=4, store=True) as at:
        os.environ |= at.s3  # this process looks at what is there
        fsspec.config.set_conf_env(fsspec.config.conf)
        parts = {"label": (labelling, images), "train": (training, steps), "loop": (looping, args.data)}
        broken = False
        for part in args.parts:
            do, much = parts[part]
            try:
                do(at, much, told)
            except Exception as error:  # the other parts tell theirs all the same
                broken = True
                told.claim(f"{part}: came to its end", 0.0, 1.0, "higher")
                told.note(f"{part} broke down: {type(error).__name__}: {str(error)[-1500:]}")
    about = f"A head and two workers of 4 logical CPUs on {os.cpu_count()} cores; {ENCODER}, {PX} px; Ray's own limits for dead nodes.\n\n"
    notes = about + "\n".join(f"- {note}" for note in told.notes)
    write("cluster", "Jobs on machines that die", told.claims, args.out, notes, {"SCRATCH": name, "TILES": args.data or "TILES"})
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
