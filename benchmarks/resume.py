"""Labeling that is killed again and again against labeling that nobody disturbs: every image once, the same masks.

    python benchmarks/resume.py

A cluster of two nodes (two raylets on this machine) labels synthetic scenes. At random moments one of these dies by SIGKILL: the driver
(the command is then given again), a model actor, or the second node (another one joins). The output is compared with an undisturbed one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from common import Claim, options, write
from parts.killer import Killer, killed, masks
from parts.scenes import ENCODER, manifest, scenes, untrained


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, kills = (120, 3) if args.quick else (args.images, args.kills)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        checkpoint, place = (
            untrained(scratch / "checkpoint", 128),
            manifest(scratch / "manifest.parquet", scenes(scratch / "archive", images, 128)),
        )
        settings = ["--set", "compute.score_actors=2", "--set", "score.batch_size=4"]
        alone = ["label", checkpoint, place, "--out", str(scratch / "alone"), *settings]
        subprocess.run([sys.executable, "-m", "raysal", *alone], check=True, stdout=subprocess.DEVNULL)
        out = str(scratch / "killed")
        killer = Killer(["label", checkpoint, place, "--out", out, *settings], args.seed)
        done = killed(killer, kills)
        expected, found = masks(str(scratch / "alone")), masks(out)
    same = sum(found.get(i) == row for i, row in expected.items())
    claims = [
        Claim(
            f"share of {images} images with the undisturbed row, once each, after {len(done)} kills",
            same / len(expected),
            1.0,
            "higher",
            "",
        ),
        Claim("rows of no image, or of an image a second time", len(found) - same, 0, "lower", ""),
        Claim("kills by SIGKILL while work went on", len(done), float(kills), "higher", ""),
    ]
    counted = ", ".join(f"{n} x {kind}" for kind, n in sorted(Counter(done).items()))
    notes = f"Killed: {counted}. The command was given {killer.starts} times. {images} scenes of 128 px, {ENCODER}, two actors, two nodes."
    write("resume", "Labeling, killed and resumed", claims, args.out, notes)


if __name__ == "__main__":
    main()
