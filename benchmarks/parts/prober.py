"""A client of its own that asks an endpoint now and then, over a new connection each time, and notes each answer.

A load generator that holds hundreds of users in one process is late to see answers where it shares its cores with the endpoint; this
process has nothing else to do. Run by `parts.endpoint.probing`.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import count
from pathlib import Path

import httpx


def main() -> None:
    url, images, notes, first, pause_s = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
    files = sorted(images.iterdir())
    with open(notes, "a", buffering=1) as out:
        for n in count(first):
            image = files[n % len(files)].read_bytes()
            clock = time.time()
            try:
                with httpx.Client(timeout=90) as client:  # made before the clock starts: what it costs is not the endpoint's
                    began = time.perf_counter()
                    response = client.post(f"{url}/v1/masks", content=image)
                    seconds, status, headers = time.perf_counter() - began, response.status_code, response.headers
            except httpx.TransportError:
                seconds, status, headers = time.perf_counter() - began, 0, httpx.Headers()
            out.write(json.dumps([clock, seconds, status, headers.get("Retry-After"), headers.get("X-Model-Digest")]) + "\n")
            time.sleep(pause_s)


if __name__ == "__main__":
    main()
