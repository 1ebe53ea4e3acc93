"""An endpoint as a user runs it, for benchmarks."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil


@dataclass
class Up:
    """A running endpoint: where it answers, its dashboard, the command's process, and the replicas that it began with."""

    url: str
    dashboard: str
    pid: int
    replicas: set[int] = field(default_factory=set)

    def now(self) -> set[int]:
        """Processes of its replicas."""
        family = psutil.Process(self.pid).children(recursive=True)
        return {p.pid for p in family if "ServeReplica:raysal" in " ".join(p.cmdline())}

    def restarts(self) -> int:
        """Replicas that are not there any more."""
        return len(self.replicas - self.now())


@contextmanager
def endpoint(checkpoint: str, *options: str) -> Iterator[Up]:
    """`raysal serve` on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "raysal", "serve", checkpoint, "--port", str(port), "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        up = Up(told["url"], told["dashboard"], process.pid)
        up.replicas = up.now()
        yield up
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(180)
        except subprocess.TimeoutExpired:
            process.kill()
