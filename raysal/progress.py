"""What a person sees while long work runs: bars on a terminal, plain lines elsewhere, JSON lines or results where machines read."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from raysal.config import Config
from raysal.words import duration

if TYPE_CHECKING:
    from raysal.rounds.loop import Outcome, Watcher

WORDS = {
    "choose": "choosing what to label",
    "buy": "buying labels",
    "train": "training both branches",
    "score": "scoring the pool",
    "label": "masks for the pool",
    "final": "last training",
    "audit": "checking random masks with experts' labels",
    "synth": "drawing scenes",
    "index": "listing the archive",
    "export": "writing masks out",
    "report": "writing the report",
    "ask": "asking for masks",
}
PLAIN_EVERY_S = 10.0
"""Seconds between progress lines where there is no terminal."""


class Ui:
    """Progress and results of one command. Logs and bars go to stderr, results to stdout.

    Args:
        as_json: Results for machines.
        log: Takes all that is said, where that is for machines too.
    """

    def __init__(self, as_json: bool, log: logging.Logger | None = None) -> None:
        self.as_json, self.log, self.console, self.out = as_json, log, Console(stderr=True), Console()
        self.live = self.console.is_terminal and log is None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title, self._said = "images", 0.0
        self._began, self._done = time.monotonic(), 0

    @classmethod
    def of(cls, as_json: bool, cfg: Config, folder: str | None = None) -> Ui:
        """As a configuration wants it, for a command that writes to a folder; None: to the configuration's `run`."""
        if not cfg.compute.log_json:
            return cls(as_json)
        from raysal.archive.uris import absolute
        from raysal.telemetry.lines import json_lines

        return cls(as_json, json_lines(absolute(folder or cfg.run)))

    def __enter__(self) -> Ui:
        if self.live:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=self.console, transient=True,
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is KeyboardInterrupt:
            self.say("stopped; the same command goes on from here")

    def watcher(self) -> Watcher:
        """The loop's callbacks."""
        from raysal.rounds.loop import Watcher

        return Watcher(on_stage=self.stage, on_progress=self.progress, on_round=self.round, on_warning=self.warning)

    def say(self, text: str, fields: Mapping[str, Any] | None = None) -> None:
        """A line; of its numbers a JSON line has fields."""
        if self.log is not None:
            self.log.info(text.strip(), extra={"fields": fields or {}})
        else:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)  # what is to be copied stays in one line

    def warning(self, text: str) -> None:
        if self.log is not None:
            self.log.warning(text)
        else:
            self.say(f"warning: {text}")

    def stage(self, round_: int | None, name: str, what: str, seconds: float) -> None:
        words = WORDS.get(name, name)
        self._title, self._said = words if round_ is None else f"round {round_}: {words}", time.monotonic()
        self._began, self._done = self._said, 0
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if what == "start" and not self.live:
            self.say(self._title)
        elif what == "done":
            self.say(f"{self._title} - {seconds:.0f} s", {"round": round_, "stage": name, "seconds": seconds})
        elif what == "kept":
            self.say(f"{self._title} - done before")

    def progress(self, done: int, total: int | None, numbers: dict) -> None:
        """One line, or a bar: how much is done, what the numbers say; of images by status, how many a second and how many of each."""
        note = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in numbers.items() if k in ("loss", "images_per_second"))
        if "ok" in numbers:
            if done < self._done:  # a new look at an archive
                self._began = time.monotonic()
            self._done = done
            rate = done / max(1e-9, time.monotonic() - self._began)
            note = ", ".join([f"{rate:.1f} images/s", *(f"{n:,} {status}" for status, n in numbers.items() if n)])
            if total is not None and not self.live and done < total:
                note += f", {duration((total - done) / max(1e-9, rate))} to go"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._title, total=total, note=note)
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._said >= PLAIN_EVERY_S or (done == total and self._said):
            self._said = time.monotonic()
            text = (f"  {done}" if total is None else f"  {done}/{total}") + (f"  {note}" if note else "")
            self.say(text, {"doing": self._title, "done": done, "total": total, **numbers})

    def round(self, metrics: dict) -> None:
        value = "-" if metrics["miou"] is None else f"{metrics['miou']:.3f}"
        text = f"round {metrics['round']}: {metrics['labels']} labels, val mIoU {value}"
        self.say(text, {name: metrics[name] for name in ("round", "labels", "miou")})

    def result(self, value: dict, text: str | Callable[[], Any]) -> None:
        """The result: JSON, or text for people."""
        if self.as_json:
            print(json.dumps(value), flush=True)
        elif self.log is not None:
            self.say("result" if callable(text) else text, {"result": value})
        elif callable(text):
            text()
        else:
            print(text, flush=True)
        sys.stdout.flush()

    def summary(self, outcome: Outcome, page: str, cfg: Config) -> None:
        """Table of rounds, and where everything is."""
        table = Table("round", "labels", "val mIoU", "weakest class", "train s", "score s", title=f"{cfg.name}: {cfg.query.strategy}")
        for m in outcome.rounds:
            iou = {k: v for k, v in (m.get("iou") or {}).items() if v is not None}
            weakest = min(iou, key=lambda k: iou[k]) if iou else None
            seconds = m["seconds"]
            table.add_row(
                str(m["round"]), str(m["labels"]), "-" if m["miou"] is None else f"{m['miou']:.3f}",
                f"{weakest} {iou[weakest]:.2f}" if weakest else "-",
                f"{seconds.get('train', 0) + seconds.get('final', 0):.0f}", f"{seconds['score']:.0f}" if "score" in seconds else "-",
            )  # fmt: skip
        self.out.print(table)
        reason = {
            "rounds": "all rounds done",
            "target": "target reached",
            "no gain": "no more gain",
            "uncertainty": "the model is certain",
            "pool": "no image left to ask for",
        }
        for name, where in (("ended", reason[outcome.stopped]), ("report", page), ("masks", outcome.labels), ("model", outcome.checkpoint)):
            self.out.print(f"{name:>7}  {where}", highlight=False, soft_wrap=True, markup=False)
        if outcome.audit is not None:
            self.out.print(
                f"  audit  mIoU of the masks {interval(outcome.audit)} (95%), from {outcome.audit['images']} random labels", highlight=False
            )


def failed(error: Exception) -> None:
    """Says why a command failed, as it said all else."""
    log = logging.getLogger("raysal")
    if log.handlers:
        log.error("%s", error)
    else:
        print(f"raysal: {error}", file=sys.stderr)


def interval(estimate: dict) -> str:
    """A value with its interval, as {value, low, high}."""
    value, low, high = ("-" if estimate[k] is None else f"{estimate[k]:.3f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def number(value: Any) -> str:
    """A score with four digits, or a dash."""
    return "  -  " if value is None else f"{value:.4f}"


def measured(result: dict) -> str:
    """What an evaluation found, for people: mIoU, calibration error, IoU by class, and the confusion in percent of each true class."""
    names = list(result["iou"])
    widths = [max(5, len(name)) for name in names]
    return "\n".join(
        [
            f"mIoU {number(result['miou'])} on {result['images']} images of {result['split']!r}",
            f"calibration error (ECE) {number(result['calibration']['ece'])}",
            "IoU by class:",
            *(f"{name:>14}  {number(value)}" for name, value in result["iou"].items()),
            "confusion, % of the pixels of each true class (rows) by predicted class (columns):",
            " " * 14 + "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True)),
            *(
                f"{name:>14}" + "".join(f"  {cell:>{width}}" for cell, width in zip(_shares(row), widths, strict=True))
                for name, row in zip(names, result["confusion"], strict=True)
            ),
        ]
    )


def audited(result: dict) -> str:
    """What an audit found, for people."""
    lines = [
        f"mIoU {interval(result['miou'])} of {result['population']} masks (95% interval), from {len(result['images'])} random images, "
        f"over the {len(result['classes_known'])} of {len(result['iou'])} classes that enough of them show",
        f"calibration error (ECE) {number(result['calibration']['ece'])}, pixel accuracy {result['accuracy']:.4f}",
        "IoU by class:",
        *(f"{name:>14}  {interval(value)}" for name, value in result["iou"].items()),
    ]
    for entry in result["abstention"]:
        reached = "nothing kept" if entry["reached_of_all"] is None else f"{100 * entry['reached_of_all']:.1f}% right"
        lines.append(f"kept for {100 * entry['precision']:.0f}% on val: {100 * entry['kept_of_all']:.1f}% of the pixels, {reached}")
    return "\n".join(lines)


def _shares(row: list[int]) -> list[str]:
    """Percent of a row's sum; a class that no truth shows has none."""
    return [f"{100 * n / sum(row):.1f}" if any(row) else "-" for n in row]
