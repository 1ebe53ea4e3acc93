"""Time of `raysal demo` by stage, from an installed checkout.

python benchmarks/demo.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

from common import Claim, options, write


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--run", help="folder to keep the demo in; default: none is kept")
    args = parser.parse_args()
    small = ["train.steps=4", "data.synthetic.images=40", "data.synthetic.val_images=8"] if args.quick else []
    with tempfile.TemporaryDirectory() as scratch:
        settings = [x for s in small for x in ("--set", s)]
        command = [sys.executable, "-m", "raysal", "demo", "--out", args.run or scratch, "--json", *settings]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        whole = time.perf_counter() - start
    result = json.loads(done.stdout)
    stages: dict[str, float] = {}
    for round_ in result["rounds"]:
        for stage, seconds in round_["seconds"].items():
            stages[stage] = stages.get(stage, 0) + seconds
    stages["start, synthetic scenes, report"] = whole - sum(stages.values())
    rows = "\n".join(f"| {stage} | {seconds:.0f} | {100 * seconds / whole:.0f}% |" for stage, seconds in stages.items())
    table = f"| stage | seconds | share |\n|---|---|---|\n{rows}\n\nRounds: " + "; ".join(
        f"{m['labels']} labels, val mIoU {m['miou']:.3f}" for m in result["rounds"]
    )
    write(
        "demo", "The demo by stage", [Claim("minutes of the whole demo after installation", whole / 60, 5, "lower", "min")], args.out, table
    )


if __name__ == "__main__":
    main()
