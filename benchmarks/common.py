"""What the benchmark programs share: options, claims, and the two files each leaves in benchmarks/results/."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """A sentence with a number in it, and what the number should be."""

    claim: str
    value: float
    target: float | None
    better: str
    unit: str

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def options(description: str | None) -> argparse.ArgumentParser:
    """Options that every program has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke run: shows that the program works, measures nothing worth keeping")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.json and NAME.md")
    return parser


def write(name: str, title: str, claims: list[Claim], out: Path, notes: str = "") -> None:
    """Writes NAME.json (the list of claims) and NAME.md (the table that a person reads), and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    where = {
        "cores": os.cpu_count(),
        "command": " ".join(["python", *map(_shown, sys.argv)]),
        "commit": _commit(),
        "date": str(date.today()),
    }
    rows = [asdict(c) | where for c in claims]
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [f"# {title}", "", "| claim | value | target | met |", "|---|---|---|---|"]
    for c in claims:
        target = "-" if c.target is None else f"{'>=' if c.better == 'higher' else '<='} {c.target:g}"
        met = {None: "-", True: "yes", False: "no"}[c.met]
        lines.append(f"| {c.claim} | {c.value:.4g} {c.unit} | {target} | {met} |")
    lines += ["", f"{where['cores']} cores, commit {where['commit']}, {where['date']}: `{where['command']}`", ""]
    text = "\n".join(lines) + (f"\n{notes.strip()}\n" if notes else "")
    (out / f"{name}.md").write_text(text)
    print(text)


def median_ratio(first: list[float], second: list[float]) -> float:
    """Median of first[i] / second[i]: pairs are measured one after the other, so that a drifting machine cancels."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _shown(argument: str) -> str:
    """Paths of this machine don't belong in a result: only the last part is kept."""
    return Path(argument).name if argument.startswith("/") else argument


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"
