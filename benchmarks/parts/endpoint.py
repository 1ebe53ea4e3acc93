"""An endpoint as a user runs it, for benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from raysal.datasets.synthetic import scene


@dataclass
class Up:
    """A running endpoint: where it answers, its dashboard, the command's process, its token, and the replicas that it began with."""

    url: str
    dashboard: str
    pid: int
    token: str | None = None
    replicas: set[int] = field(default_factory=set)

    def processes(self, *kinds: str) -> list[psutil.Process]:
        """Its processes whose command line names one of the kinds; without any its replicas."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                if any(kind in " ".join(process.cmdline()) for kind in kinds or ("ServeReplica:raysal",)):
                    found.append(process)
        return found

    def resident_mb(self, *kinds: str) -> float:
        """Resident memory of `processes`."""
        total = 0
        for process in self.processes(*kinds):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def restarts(self) -> int:
        """Replicas that are not there any more."""
        return len(self.replicas - {p.pid for p in self.processes()})


@contextmanager
def endpoint(checkpoint: str, *options: str, haproxy: bool = False) -> Iterator[Up]:
    """`raysal serve` on a free port; behind HAProxy instead of Ray's own proxy where that is asked for, which needs a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "raysal", "serve", checkpoint, "--port", str(port), "--json", *options]
    token, more = (secrets.token_hex(24), dict[str, str]()) if haproxy else (None, {})
    place = tempfile.mkdtemp(prefix="h-")  # its files are shared by all on a machine otherwise; a socket's path must be short
    if token is not None:
        more = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAYSAL_TOKENS": token, "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{place}/haproxy.cfg"}
        more |= {f"RAY_SERVE_HAPROXY_{name}": f"{place}/{name[:2]}" for name in ("SOCKET_PATH", "SERVER_STATE_FILE", "METRICS_SOCKET_PATH")}
        more["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = place
    said = Path(place) / "said"
    with open(said, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | more)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the endpoint ended with status {process.wait()} before it was up: {said.read_text()[-2000:].strip()}")
        told = json.loads(line)
        up = Up(told["url"], told["dashboard"], process.pid, token)
        up.replicas = {p.pid for p in up.processes()}
        yield up
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(180)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        asked: When, seconds of the clock.
        seconds: How long it took.
        status: 0: none.
        retry_after: The header, where there is one.
        digest: Of the model that answered, where it is told.
    """

    asked: float
    seconds: float
    status: int
    retry_after: str | None
    digest: str | None


def pictures(folder: Path, count: int, px: int, first: int = 0) -> list[Path]:
    """JPEG files, all different: a few scenes, shifted. An endpoint remembers what it said of an image, so none may come twice.

    Args:
        folder: Is made.
        count: How many.
        px: Their side.
        first: Number of the first, where there are some already.
    """
    scenes, rng = [scene(0, n, px)[0] for n in range(24)], np.random.default_rng(first)
    folder.mkdir(exist_ok=True)
    files = []
    for n in range(first, first + count):
        image = np.roll(scenes[n % len(scenes)], tuple(rng.integers(0, px, 2)), axis=(0, 1))
        files.append(folder / f"{n:06d}.jpg")
        Image.fromarray(image).save(files[-1], quality=90)
    return files


def load(up: Up, images: Path, clients: int, seconds: float, first: int = 0, rate: float = 0.0) -> list[Answer]:
    """What locust got.

    Args:
        up: The endpoint.
        images: Folder that its users take images from, in turn.
        clients: Users at once.
        seconds: How long.
        first: The image to begin with.
        rate: Requests a second of all users together; 0: each asks again as soon as it has its answer.
    """
    with tempfile.TemporaryDirectory() as name:
        notes = Path(name) / "notes.jsonl"
        about = {"LOAD_IMAGES": images, "LOAD_NOTES": notes, "LOAD_FIRST": first, "LOAD_PACE_S": clients / rate if rate else 0}
        about["LOAD_TOKEN"] = up.token or ""
        command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("load.py")), "--headless", "--host", up.url]
        command += ["-u", str(clients), "-r", str(clients), "-t", f"{seconds:.0f}s", "--stop-timeout", "60", "--only-summary"]
        done = subprocess.run(command, env=os.environ | {k: str(v) for k, v in about.items()}, capture_output=True, text=True)
        if not notes.exists():
            raise SystemExit(f"locust did not run ({done.stderr.strip()[-400:]}); pip install -e '.[bench]'")
        return noted(notes)


@contextmanager
def probing(up: Up, images: Path, first: int, rate: float, notes: Path) -> Iterator[None]:
    """Lets a process of its own ask about `rate` times a second, and write its answers down.

    Args:
        up: The endpoint, without a token.
        images: Folder that it takes images from, in turn.
        first: The image to begin with.
        rate: Requests a second, at most: each is waited for.
        notes: For its answers, see `noted`.
    """
    command = [sys.executable, str(Path(__file__).with_name("prober.py")), up.url, str(images), str(notes), str(first), str(1 / rate)]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def noted(notes: Path) -> list[Answer]:
    """Answers that a process has written down, one a line."""
    return [Answer(*json.loads(line)) for line in notes.read_text().splitlines()]
