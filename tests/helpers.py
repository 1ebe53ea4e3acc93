"""What several tests share: a configuration small enough to train in seconds, and commands run as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from raysal.config import Config, build

Call = Callable[..., tuple[int, str, str]]
"""The fixture `raysal` of the unit tests."""

TINY: dict = {
    "name": "tiny",
    "data": {"synthetic": {"images": 24, "val_images": 4, "size_px": 32}},
    "augment": {"crop_px": 32, "scale": [0.8, 1.2]},
    "model": {"arch": "Unet", "encoder": "tu-mobilenetv3_small_050"},
    "cps": {"weight": 1.0},
    "optim": {"name": "adamw", "lr": 1e-3},
    "train": {"steps": 12, "batch_labeled": 2, "batch_unlabeled": 2, "checkpoint_every": 3, "eval_every": 0, "log_every": 1},
    "loop": {"initial": 3, "per_round": 2, "rounds": 1},
    "runtime": {"kind": "eager"},  # making another one takes longer than the work
    "compute": {"train_workers": 0, "local_cpus": 8, "score_actors": 2, "threads": 1},
}


def tiny(run: Path | str, **sections: dict) -> Config:
    """The tiny configuration with sections updated: ``tiny(tmp, train={"steps": 4})``."""
    return build(tiny_tree(run, **sections))


def tiny_tree(run: Path | str, **sections: dict) -> dict:
    tree = json.loads(json.dumps(TINY)) | {"run": str(run)}
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values if isinstance(values, dict) else values
    return tree


def write_config(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def start(*arguments: str) -> subprocess.Popen:
    """Starts ``raysal ARGUMENTS`` in its own session."""
    env = {**os.environ, "RAYSAL_WORKER_LOGS": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "raysal", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )


def run(*arguments: str, timeout_s: float = 850) -> subprocess.CompletedProcess:
    """Runs ``raysal ARGUMENTS`` to its end."""
    process = start(*arguments)
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def kill_when(process: subprocess.Popen, reached: Callable[[], bool], timeout_s: float = 600) -> None:
    """SIGKILLs a command's driver once `reached` holds, and what is left of its processes soon after: Ray's agents stay for a minute."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, f"ended before it could be killed: {process.stderr.read()[-3000:]}"
        assert time.monotonic() < deadline, "never reached the moment to be killed at"
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    for left in alive:
        left.kill()


def processes(title: str, parent: int) -> list[psutil.Process]:
    """Processes below `parent` whose title contains a text, for example "ray::Scorer"."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
