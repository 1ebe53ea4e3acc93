"""The endpoint at four times what it can do, for a minute: who is turned away is told at once, who is taken is answered in time.

    pip install -e '.[bench]'
    python benchmarks/serve_overload.py

First as many clients of locust as the endpoint takes at once ask without a pause: that is what it can do, unloaded. Then four times as many
requests a second come, whether they are answered or not. No image comes twice.

How soon requests are turned away is what a client of its own sees, a process that asks twice a second meanwhile. locust's own number stands
beside it: its hundreds of users share one process, and that its cores with the endpoint, so it is late to look at its answers.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from common import Claim, options, write
from parts.endpoint import Answer, Up, endpoint, load, noted, pictures, probing
from parts.scenes import untrained

SHED = (429, 503)
PROBES_A_SECOND = 2.0


class Memory(threading.Thread):
    """Largest resident MB of all that the endpoint runs, proxy included, twice a second."""

    def __init__(self, up: Up) -> None:
        super().__init__(daemon=True)
        self.up, self.seen, self.over = up, [up.resident_mb("ServeReplica", "Proxy")], threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            self.seen.append(self.up.resident_mb("ServeReplica", "Proxy"))


def percentile(answers: list[Answer], share: float) -> float:
    return float(np.percentile([a.seconds for a in answers], share)) if answers else float("nan")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    seconds, px = (10.0, 64) if args.quick else (args.seconds, args.px)
    settled_s = seconds / 12  # left out at the start of each load
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        checkpoint = untrained(scratch / "checkpoint", px, args.encoder)
        count = len(pictures(scratch / "images", 1000 if args.quick else 6000, px))
        with endpoint(checkpoint) as up:
            load(up, scratch / "images", 4, 5.0)
            calm = [a for a in load(up, scratch / "images", 16, seconds / 2, 200) if a.status == 200]
            calm = [a for a in calm if a.asked > calm[0].asked + settled_s]
            capacity = len(calm) / (max(a.asked + a.seconds for a in calm) - min(a.asked for a in calm))
            memory = Memory(up)
            memory.start()
            rate = 4.2 * capacity  # so that four times comes, also by how it is counted
            began = time.time()
            with probing(up, scratch / "images", count // 2, PROBES_A_SECOND, scratch / "probes"):
                answers = load(up, scratch / "images", 256, seconds, 200 + len(calm) * 2, rate=rate)
            memory.over.set()
            restarts = up.restarts()
        probes = [a for a in noted(scratch / "probes") if began + settled_s < a.asked < began + seconds]
    answers = [a for a in answers if a.asked > began + settled_s]
    taken = [a for a in answers if a.status == 200]
    shed, told = ([a for a in some if a.status in SHED] for some in (answers, probes))
    others = Counter(a.status for a in answers if a.status not in (200, *SHED))
    others.update(a.status for a in probes if a.status not in (200, *SHED))
    offered = len(answers) / (max(a.asked for a in answers) - min(a.asked for a in answers))
    untold = sum(a.retry_after is None for a in [*shed, *told])
    slower, grown = percentile(taken, 99) / percentile(calm, 99), float(np.mean(memory.seen[-20:]) / np.mean(memory.seen[:20]))
    answered = len(taken) / (seconds - settled_s)
    claims = [
        Claim("requests a second that came / that it can do", offered / capacity, 4.0, "higher", "x"),
        Claim("median of the time until a client of its own is turned away", percentile(told, 50), 0.05, "lower", "s"),
        Claim("the same as locust's 256 users see it, which share one process", percentile(shed, 50), None, "lower", "s"),
        Claim("p99 of accepted answers / of answers at saturation without overload", slower, 2.0, "lower", "x"),
        Claim("answers other than 200, 429 and 503 (0 stands for none at all)", sum(others.values()), 0, "lower", ""),
        Claim("answers of 429 and 503 without Retry-After", untold, 0, "lower", ""),
        Claim("images/s answered under overload / without", answered / capacity, None, "higher", "x"),
        Claim("memory of replica and proxy, last ten seconds / first ten", grown, 1.1, "lower", "x"),
        Claim("replicas that died", restarts, 0, "lower", ""),
    ]

    def spread(some: list[Answer]) -> str:
        return f"p50 {percentile(some, 50):.3f} s, p99 {percentile(some, 99):.3f} s"

    notes = (
        f"DeepLabV3+ with {args.encoder}, {px} px, one replica; locust runs on the same cores. Saturated by 16 clients: {capacity:.1f} "
        f"images/s, {spread(calm)}. Overload: {offered:.0f} requests/s for {seconds:.0f} s by 256 clients over {count} images: "
        f"{len(taken)} answered ({spread(taken)}), {len(shed)} turned away ({spread(shed)}), others: {dict(others)}. "
        f"The client of its own, {PROBES_A_SECOND:g} requests/s over a new connection each: {len(probes)} answers, {len(told)} turned away "
        f"({spread(told)}). locust's times hold how long its own process took to look at its answers."
    )
    write("serve_overload", "The endpoint at four times its capacity", claims, args.out, notes)


if __name__ == "__main__":
    main()
