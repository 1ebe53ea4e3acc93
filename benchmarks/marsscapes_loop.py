"""The main job on real Curiosity tiles: `raysal loop --config configs/marsscapes.yaml`, its report and its metrics kept.

    python benchmarks/marsscapes_loop.py --data PATH/mars --weights PATH/tf_efficientnet_lite0.safetensors

PATH/mars holds MarsScapes tiles in raysal's folder layout (docs/datasets.md). Killed and started again with the same --run, it goes on.
What is kept names no path of this machine: DATA, WEIGHTS and RUN stand for them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from common import Claim, options, scrub, write


def keep(run: Path, report: Path, out: Path, places: Mapping[str, str]) -> list[dict]:
    """Copies a run's metrics and its report without paths of this machine. Returns the metrics by round."""
    out.mkdir(parents=True, exist_ok=True)
    rounds = [json.loads(scrub((folder / "metrics.json").read_text(), places)) for folder in sorted((run / "rounds").iterdir())]
    for metrics in rounds:
        (out / f"metrics-round-{metrics['round']}.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (out / "report.html").write_text(scrub(report.read_text(encoding="utf-8"), places), encoding="utf-8")
    return rounds


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--run", default="runs/marsscapes")
    args = parser.parse_args()
    config = Path(__file__).parents[1] / "configs" / "marsscapes.yaml"
    settings = [f"data.root={args.data}", f"model.encoder_weights={args.weights}", f"run={args.run}"]
    settings += ["train.steps=4", "train.eval_every=0", "loop.rounds=1"] if args.quick else []
    command = [sys.executable, "-m", "raysal", "loop", "--config", str(config), "--json", *(x for s in settings for x in ("--set", s))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    places = {"DATA": args.data, "WEIGHTS": args.weights, "RUN": args.run}
    rounds = keep(Path(args.run), Path(result["report"]), args.out / "marsscapes_loop", places)
    classes = list(rounds[-1]["iou"])
    lines = ["| round | labels | val mIoU | " + " | ".join(classes) + " | train s | score s |", "|---" * (len(classes) + 5) + "|"]
    for m in rounds:
        cells = ["-" if m["iou"][c] is None else f"{m['iou'][c]:.3f}" for c in classes]
        s = m["seconds"]
        row = [m["round"], m["labels"], f"{m['miou']:.4f}", *cells, round(s["train"]), round(s["score"]) if "score" in s else "-"]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    claims = [
        Claim(f"val mIoU with {m['labels']} labels of 1,017 ({100 * m['labels'] / 1017:.1f}%)", m["miou"], None, "higher", "")
        for m in rounds
    ]
    whole = sum(sum(m["seconds"].values()) for m in rounds) / 60
    claims.append(Claim("minutes of the whole loop", whole, None, "lower", "min"))
    notes = (
        "\n".join(lines)
        + "\n\nIoU by class; one seed; the model is the last checkpoint, val is for reporting only. The report: marsscapes_loop/report.html"
    )
    write("marsscapes_loop", "The loop on real Curiosity tiles (MarsScapes)", claims, args.out, notes, places)


if __name__ == "__main__":
    main()
