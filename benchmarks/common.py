"""What the benchmark programs share: options, claims, and the two files each leaves in benchmarks/results/."""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).resolve().parents[1]
PICTURE = re.compile(r"(data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+)")
MACHINE_PATH = re.compile(r"""(?<![\w.:/-])(?:file://)?(?:\.\.|~)?/[^,"'\]}]*""")
"""An absolute path, or one that leaves the working folder, inside an argument."""


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


def write(
    name: str, title: str, claims: list[Claim], out: Path, notes: str = "", places: Mapping[str, str | os.PathLike[str]] | None = None
) -> None:
    """Writes NAME.json (the list of claims) and NAME.md (the table that a person reads), and prints the table.

    Args:
        name: Of the program.
        title: Of the table.
        claims: What was measured.
        out: Folder of the two files.
        notes: More for the reader of NAME.md.
        places: Paths of this machine that must not be in a result, see `scrub`.
    """
    out.mkdir(parents=True, exist_ok=True)
    places = places or {}
    where = {
        "cores": os.cpu_count(),
        "command": " ".join(["python", *(shown(scrub(argument, places)) for argument in sys.argv)]),
        "commit": _commit(),
        "date": str(date.today()),
    }
    rows = [asdict(c) | where for c in claims]
    (out / f"{name}.json").write_text(scrub(json.dumps(rows, indent=1) + "\n", places))
    lines = [f"# {title}", "", "| claim | value | target | met |", "|---|---|---|---|"]
    for c in claims:
        target = "-" if c.target is None else f"{'>=' if c.better == 'higher' else '<='} {c.target:g}"
        met = {None: "-", True: "yes", False: "no"}[c.met]
        lines.append(f"| {c.claim} | {c.value:.4g} {c.unit} | {target} | {met} |")
    lines += ["", f"{where['cores']} cores, commit {where['commit']}, {where['date']}: `{where['command']}`", ""]
    text = scrub("\n".join(lines) + (f"\n{notes.strip()}\n" if notes else ""), places)
    (out / f"{name}.md").write_text(text)
    print(text)


def median_ratio(first: list[float], second: list[float]) -> float:
    """Median of first[i] / second[i]: pairs are measured one after the other, so that a drifting machine cancels."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def scrub(text: str, places: Mapping[str, str | os.PathLike[str]]) -> str:
    """Text without paths of this machine: results are for everybody.

    Args:
        text: Plain text, JSON or HTML. Pictures in it are left as they are.
        places: Path by the word that takes its place, for example ``{"DATA": args.data}``. Relative paths stand for their absolute
            ones too; inside the working folder their relative form may stay. The repository's own folder is always replaced.

    Raises:
        ValueError: An absolute path of one of the places is still there.
    """
    words = {form: word for word, place in {"REPOSITORY": REPOSITORY, **places}.items() for form in _forms(os.fspath(place))}
    forms = sorted(words, key=len, reverse=True)  # what lies inside another place goes first
    pattern = re.compile("(?<![\\w./-])(?:file://)?(" + "|".join(map(re.escape, forms)) + ")")
    given = [form for place in places.values() for form in _forms(os.fspath(place)) if form.startswith("/") or "://" in form]
    parts = PICTURE.split(text)
    for i in range(0, len(parts), 2):  # between the pictures, whose letters may look like a path
        parts[i] = pattern.sub(lambda found: words[found.group(1)], parts[i])
        if left := [form for form in given if form in parts[i]]:
            raise ValueError(f"{left[0]} of this machine is still in the result; it may not be kept like this")
    return "".join(parts)


def _forms(place: str) -> set[str]:
    """How a place may be written in plain text, JSON and HTML; nothing for names that are no path of this machine."""
    place = place.rstrip("/")
    if "://" in place:
        plain = {place}
    else:
        path = Path(place).expanduser()
        plain = {os.path.abspath(path), str(path.resolve())} | ({place} if place.startswith((".", "~")) and "/" in place else set())
    plain -= {"", "/"}
    return {form for text in plain for form in (text, html.escape(text), html.escape(text, quote=False), json.dumps(text)[1:-1])}


def shown(argument: str) -> str:
    """An argument of the command line with only the last part of paths of this machine."""
    return MACHINE_PATH.sub(lambda found: Path(found.group()).name, argument)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"
