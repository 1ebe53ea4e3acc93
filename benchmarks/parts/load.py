"""A locust user that asks an endpoint for masks, and notes each answer. Run by `parts.endpoint.load`."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from pathlib import Path

import gevent
from locust import FastHttpUser, task

FILES = sorted(Path(os.environ["LOAD_IMAGES"]).iterdir())
NOTES = open(os.environ["LOAD_NOTES"], "a", buffering=1)  # noqa: SIM115 - until the process ends
PACE_S = float(os.environ["LOAD_PACE_S"])
HEADERS = {"Authorization": f"Bearer {token}"} if (token := os.environ["LOAD_TOKEN"]) else {}
NEXT = itertools.count(int(os.environ["LOAD_FIRST"]))


class Client(FastHttpUser):
    """Asks again as soon as it has its answer, or every PACE_S seconds."""

    connection_timeout = network_timeout = 90.0
    if PACE_S:

        def on_start(self) -> None:
            """Users begin at any time of their pace: together they would ask all at once, again and again."""
            self.due = time.perf_counter() + random.uniform(0, PACE_S)
            gevent.sleep(self.due - time.perf_counter())

        def wait_time(self) -> float:
            """Until its next request is due; locust's constant_pacing counts from when users are made, which is for all at once."""
            self.due += PACE_S
            return max(0.0, self.due - time.perf_counter())

    @task
    def ask(self) -> None:
        """One image, another one each time."""
        image = FILES[next(NEXT) % len(FILES)].read_bytes()
        began, clock = time.perf_counter(), time.time()
        with self.client.post("/v1/masks", data=image, headers=HEADERS, catch_response=True) as response:
            seconds = time.perf_counter() - began
            response.success()  # what a status means is for whoever reads the notes
        headers = response.headers or {}
        NOTES.write(json.dumps([clock, seconds, response.status_code, headers.get("Retry-After"), headers.get("X-Model-Digest")]) + "\n")
