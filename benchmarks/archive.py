"""Real images that nobody labelled, labelled by a model of the main job, and the report on the masks.

    python benchmarks/archive.py --data PATH/mars --run runs/marsscapes

PATH/mars/unlabeled and PATH/mars/panoramas are indexed and labelled with the last checkpoint of the run that `marsscapes_loop.py` leaves.
What is kept names no path of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Claim, options, scrub, write


def raysal(*arguments: str) -> Any:
    """What a command says as JSON."""
    done = subprocess.run([sys.executable, "-m", "raysal", *arguments, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", help="not needed, as the checkpoint holds all; for programs to be called alike")
    parser.add_argument("--run", default="runs/marsscapes")
    parser.add_argument("--precision", type=float, default=0.9, help="share of right pixels that masks are to keep to, by class")
    args = parser.parse_args()
    checkpoint = str(sorted(Path(args.run).glob("rounds/*/checkpoint"))[-1])
    folders = [os.path.join(args.data, "panoramas", "images")] + ([] if args.quick else [os.path.join(args.data, "unlabeled")])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        manifest, labels = str(scratch / "manifest"), str(scratch / "labels")
        indexed = raysal("index", *folders, "--out", manifest)
        limits = ["--set", "data.max_pixels=400000000"]
        done = raysal("label", checkpoint, manifest, "--out", labels, "--precision", str(args.precision), *limits)
        raysal("report", labels, "--manifest", manifest)
        kept = args.out / "archive"
        kept.mkdir(parents=True, exist_ok=True)
        places = {"DATA": args.data, "RUN": args.run, "SCRATCH": scratch}
        (kept / "report.html").write_text(scrub((scratch / "labels-report" / "index.html").read_text(encoding="utf-8"), places))
    images = done["rows"]
    claims = [
        Claim(f"share of {images:,} real images that got a mask", done["counts"]["ok"] / images, 1.0, "higher", ""),
        Claim(f"images per second, start-up included ({done['runtime']})", done["images_per_second"], None, "higher", "images/s"),
    ]
    notes = f"{indexed['rows']:,} images indexed, by status: {done['counts']}; precision {args.precision:g}. [Report](archive/report.html)."
    write("archive", "An archive that nobody labelled", claims, args.out, notes, places)


if __name__ == "__main__":
    main()
