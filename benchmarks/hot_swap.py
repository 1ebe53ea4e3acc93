"""Another model is taken into use while the endpoint answers, bad ones are refused, and a replica is killed: what clients see of it.

    pip install -e '.[bench]'
    python benchmarks/hot_swap.py

Two replicas; users of locust ask at a steady rate, a share of what the endpoint can do, without any retry. The command that promotes a
model, and the checks that it makes, run on the same cores.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import Claim, options, write
from parts.endpoint import Answer, Up, endpoint, load, pictures
from parts.scenes import untrained
from PIL import Image

from raysal.client import Endpoint
from raysal.config import ModelConfig
from raysal.errors import RaysalError
from raysal.images.masks import encode_mask
from raysal.labels import AI4MARS
from raysal.model import checkpoint as checkpoints
from raysal.model.checkpoint import ModelInfo, digest_at
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor

CLIENTS = 16
REFERENCE_IMAGES = 8
REFUSED = 2
"""Exit status of a command whose input is no good."""


def reference(folder: Path, checkpoint: str, images: list[Path]) -> Path:
    """A data set whose masks are a model's own: no other can do better on it."""
    predictor = Predictor.load(checkpoint)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for file in images:
        shutil.copy(file, folder / "images" / file.name)
        mask_HW = predictor.masks([np.asarray(Image.open(file).convert("RGB"))])[0]
        values_HW = np.asarray(predictor.info.label_set.values, np.uint8)[mask_HW]
        (folder / "masks" / f"{file.stem}.png").write_bytes(encode_mask(values_HW))
    (folder / "classes.json").write_text(json.dumps(predictor.info.label_set.to_dict()))
    names = [file.stem for file in images]
    (folder / "splits.json").write_text(json.dumps({"train": names[:1], "val": names[1:]}))
    return folder


def others(folder: Path, first: str, px: int, encoder: str) -> dict[str, str]:
    """Checkpoints that want to take over: one like the first, one damaged, one of other classes, one that does worse."""
    found = checkpoints.load(first)
    for k, parameter in enumerate(found.model.parameters()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k))
        parameter.data += 1e-4 * float(parameter.data.abs().mean()) * drawn
    places = {name: str(folder / name) for name in ("good", "damaged", "other classes", "worse")}
    checkpoints.save(places["good"], found.model, found.info)
    shutil.copytree(first, places["damaged"])
    weights = Path(places["damaged"]) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0xFF
    weights.write_bytes(data)
    model = ModelConfig(encoder=encoder)
    checkpoints.save(places["other classes"], TwoBranch(model, AI4MARS.n_classes, 0), ModelInfo(AI4MARS, model, 1.0, px))
    checkpoints.save(places["worse"], TwoBranch(model, found.info.label_set.n_classes, 5), found.info)
    return places


def promote(up: Up, checkpoint: str) -> tuple[int, str]:
    """Exit status and message of `raysal serve promote`."""
    command = [sys.executable, "-m", "raysal", "serve", "promote", checkpoint, "--dashboard", up.dashboard]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, " ".join(done.stderr.split())[-300:]


@dataclass(frozen=True)
class Load:
    """Answers to a steady load, and when something was done meanwhile, seconds of the clock."""

    answers: list[Answer]
    began: float
    ended: float

    @property
    def calm(self) -> list[Answer]:
        """Those that were there before it."""
        return [a for a in self.answers[CLIENTS:] if a.asked + a.seconds < self.began]

    @property
    def during(self) -> list[Answer]:
        """Those to requests that were under way while it happened, or came within 10 s."""
        return [a for a in self.answers if a.asked + a.seconds >= self.began and a.asked <= self.ended + 10]


def beside(up: Up, images: Path, seconds: float, first: int, rate: float, act: Callable[[], object]) -> Load:
    """A steady load while something is done."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.extend(load(up, images, CLIENTS, seconds, first, rate)))
    thread.start()
    time.sleep(seconds / 4)
    began = time.time()
    act()
    ended = time.time()
    thread.join()
    print(f"  took {ended - began:.1f} s of {seconds:g}", flush=True)
    if not answers or max(a.asked for a in answers) <= ended:
        raise SystemExit(f"the load was over before what happened beside it, which took {ended - began:.0f} s: give it longer, --seconds")
    return Load(answers, began, ended)


def check_swapped(swapped: Load, old: str, new: str) -> None:
    """Ends the program where the answers do not show both models, and the new one alone once the promotion was over."""
    good = [a for a in swapped.answers if a.status == 200]
    after = {a.digest for a in good if a.asked > swapped.ended}
    if {a.digest for a in good} != {old, new} or after != {new}:
        raise SystemExit(f"no swap was seen: {dict(Counter(a.digest for a in good))}, after it {after}")


def failures(answers: list[Answer]) -> dict[int, int]:
    """How many were answered with what, without the good ones; status 0 is a broken connection."""
    return dict(Counter(a.status for a in answers if a.status != 200))


def p99(answers: list[Answer]) -> float:
    return float(np.percentile([a.seconds for a in answers], 99))


class Retrying(threading.Thread):
    """A client of `raysal.client` that asks without a pause until it is told to stop."""

    def __init__(self, up: Up, files: list[Path]) -> None:
        super().__init__()
        self.endpoint, self.files, self.over = Endpoint(up.url), files, threading.Event()
        self.answered, self.failed = 0, list[str]()

    def run(self) -> None:
        for file in itertools.cycle(self.files):
            if self.over.is_set():
                return
            try:
                self.endpoint.mask(file)
                self.answered += 1
            except RaysalError as error:
                self.failed.append(str(error))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=160.0, help="of each load; longer than a promotion takes")
    parser.add_argument("--share", type=float, default=0.25, help="of what the endpoint can do, that is asked of it")
    args = parser.parse_args()
    seconds, px = (60.0, 64) if args.quick else (args.seconds, args.px)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        first = untrained(scratch / "first", px, args.encoder)
        places = others(scratch, first, px, args.encoder)
        old, new = digest_at(first), digest_at(places["good"])
        files = pictures(scratch / "images", 1000 if args.quick else 6000, px)
        gate = reference(scratch / "reference", first, files[:REFERENCE_IMAGES])
        with endpoint(first, "--replicas", "2", "--reference", str(gate)) as up:
            load(up, scratch / "images", CLIENTS, 8.0, 10)
            full = [a for a in load(up, scratch / "images", CLIENTS, 20.0, 200) if a.status == 200]
            rate = args.share * len(full) / (max(a.asked + a.seconds for a in full) - min(a.asked for a in full))
            said: list[tuple[int, str]] = []
            swap = beside(up, scratch / "images", seconds, len(files) // 6, rate, lambda: said.append(promote(up, places["good"])))
            if said[0][0] != 0:
                raise SystemExit(f"the good model was refused: {said[0][1]}")
            check_swapped(swap, old, new)
            refusals = {name: promote(up, places[name]) for name in ("damaged", "other classes", "worse")}
            victim = max(up.processes(), key=lambda p: p.cpu_times().user)
            own = len(files) // 15
            retrying = [Retrying(up, files[len(files) // 2 + own * k :][:own]) for k in range(3)]
            for client in retrying:
                client.start()

            def kill() -> None:
                victim.send_signal(signal.SIGKILL)
                victim.wait(60)
                while len(up.processes()) < 2:
                    time.sleep(0.5)

            killed = beside(up, scratch / "images", seconds / 2, len(files) * 3 // 4, rate, kill).during
            for client in retrying:
                client.over.set()
                client.join()
    if not all(client.answered for client in retrying):
        raise SystemExit(f"retrying clients got no answer: {[client.failed[:3] for client in retrying]}")
    calm, swapped = swap.calm, swap.during
    by_model = dict(Counter((a.digest or "")[:12] for a in swapped))
    lost, swap_lost = failures(killed), failures(swapped)
    claims = [
        Claim("swap with two replicas: requests that failed", sum(swap_lost.values()), 0, "lower", ""),
        Claim("swap: p99 of answers during / before", p99(swapped) / p99(calm), 2.0, "lower", "x"),
        Claim("bad models refused (damaged, other classes, worse)", sum(c == REFUSED for c, _ in refusals.values()), 3, "higher", ""),
        Claim("a replica killed: requests without retry that failed", sum(lost.values()), CLIENTS, "lower", ""),
        Claim("a replica killed: answers that retrying clients did not get", sum(len(c.failed) for c in retrying), 0, "lower", ""),
    ]
    notes = (
        f"DeepLabV3+ with {args.encoder}, {px} px, 2 replicas, {os.cpu_count()} cores; locust and the command run on the same ones. "
        f"{rate:.1f} requests/s, {args.share:g} of what it can do. Before: {len(calm)} answers, p99 {p99(calm):.2f} s; during: "
        f"{len(swapped)}, p99 {p99(swapped):.2f} s, failed {swap_lost}. Killed: {len(killed)} answers, failed {lost}; retrying clients "
        f"got {sum(c.answered for c in retrying)}. Answers by model during the swap: {by_model}; "
        f"after it the new one's alone.\n\n" + "\n".join(f"- {name}: {text}" for name, (_, text) in refusals.items())
    )
    write("hot_swap", "Another model while the endpoint answers", claims, args.out, notes, {"SCRATCH": scratch})


if __name__ == "__main__":
    main()
