"""The ledger of a run: what each round did, stage by stage.

A stage writes its outputs, then its marker; marked stages are never repeated.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import yaml

import raysal
from raysal.archive.uris import absolute, exists, join, list_names, locked, read_bytes, remove_tree, write_bytes
from raysal.config import Config, build
from raysal.errors import ConfigError, InputError

OnStage = Callable[[int | None, str, str, float], None]
"""Called with (round or None, stage, "start" | "done" | "kept", seconds)."""

EXTENDABLE = {"rounds", "target_miou", "no_gain_rounds", "min_gain", "uncertainty_below", "full_miou", "audit"}
"""Knobs of ``loop`` that may change between two calls on one run: they only say how far to go."""


class Ledger:
    """Folder of a run at any fsspec URI.

    Args:
        run: URI of the run folder.
        on_stage: Told of each stage as it begins, ends, or is found done.
    """

    def __init__(self, run: str, on_stage: OnStage | None = None) -> None:
        self.run, self.on_stage = absolute(run), on_stage or (lambda *_: None)

    def folder(self, round_: int | None) -> str:
        """Of a round, or of the whole run for stages that belong to no round."""
        return self.run if round_ is None else join(self.run, "rounds", f"{round_:03d}")

    def check(self, cfg: Config, kind: str, labels: str | None = None) -> None:
        """Checks that the run, where it was begun before, is the same one. Changes nothing.

        Args:
            cfg: The whole configuration.
            kind: The command that owns the run: ``loop`` or ``train``.
            labels: Digest of the labels that it was given, where it was given some.

        Raises:
            ConfigError: The run was begun by another command, with other labels, or with other values; each is named.
        """
        other = "use another run folder (run=...)"
        if exists(join(self.run, "run.json")):
            notes = self.notes()
            if notes["kind"] != kind:
                raise ConfigError(f"{self.run} was begun by `raysal {notes['kind']}`, not by `raysal {kind}`; {other}")
            if notes["labels"] != labels:
                raise ConfigError(f"{self.run} was begun with other labels (--labels); {other} or give the same again")
        uri = join(self.run, "config.yaml")
        if exists(uri) and (changed := _differences(build(yaml.safe_load(read_bytes(uri)), uri), cfg)):
            raise ConfigError(f"{self.run} was begun with another configuration; {other} or put these back:\n  " + "\n  ".join(changed))

    def open(self, cfg: Config, kind: str, labels: str | None = None) -> None:
        """Records what `check` compares. Called once nothing more can be refused: a refused run must leave no trace to trip over."""
        write_bytes(join(self.run, "config.yaml"), cfg.to_yaml().encode())
        if not exists(join(self.run, "run.json")):
            about = {"kind": kind, "labels": labels, "config_digest": cfg.digest()}
            write_json(join(self.run, "run.json"), about | {"raysal_version": raysal.__version__, "created_at": _now()})

    def note(self, **values: object) -> None:
        """Adds to run.json what a reader of the run should know: warnings, why it ended."""
        write_json(join(self.run, "run.json"), self.notes() | values)

    def notes(self) -> dict[str, Any]:
        """What run.json holds."""
        found: dict[str, Any] = read_json(join(self.run, "run.json"))
        return found

    def done(self, round_: int | None, stage: str) -> dict[str, Any] | None:
        """Outputs of a finished stage, None where it is not finished."""
        uri = join(self.folder(round_), "stages", f"{stage}.json")
        return read_json(uri)["outputs"] if exists(uri) else None

    def forget(self, round_: int | None, stage: str) -> None:
        """Has a finished stage done again."""
        remove_tree(join(self.folder(round_), "stages", f"{stage}.json"))

    def stage(self, round_: int | None, name: str, work: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """Does a stage once. `work` gets the round's folder and returns small JSON-able outputs; returns them, now or from the marker."""
        kept = self.done(round_, name)
        if kept is not None:
            self.on_stage(round_, name, "kept", 0.0)
            return kept
        self.on_stage(round_, name, "start", 0.0)
        start = time.monotonic()
        outputs = work(self.folder(round_))
        seconds = round(time.monotonic() - start, 2)
        marker = {"stage": name, "round": round_, "finished_at": _now(), "seconds": seconds, "outputs": outputs}
        write_json(join(self.folder(round_), "stages", f"{name}.json"), marker)
        self.on_stage(round_, name, "done", seconds)
        return outputs

    def seconds(self, round_: int) -> dict[str, float]:
        """Seconds of each finished stage of a round."""
        folder = join(self.folder(round_), "stages")
        return {n.removesuffix(".json"): read_json(join(folder, n))["seconds"] for n in list_names(folder) if n.endswith(".json")}

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keeps a second driver off the same local run; the lock ends with the process, however it ends.

        Raises:
            InputError: Another process is at work on this run.
        """
        return locked(self.run, "another process is at work on this run; wait for it, or use another run folder")


def write_json(uri: str, value: object) -> None:
    """Writes JSON whole or not at all."""
    write_bytes(uri, json.dumps(value, indent=1, allow_nan=False).encode())


def read_json(uri: str) -> Any:
    """Reads JSON of the ledger. Raises InputError where the file is damaged."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise InputError(f"{uri}: damaged ({error}); delete this file to do its stage again") from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _differences(before: Config, now: Config) -> list[str]:
    left, right = (c.model_dump(mode="json", exclude={"run", "name", "compute"}) for c in (before, now))
    return [f"{k}: was {a!r}, now {b!r}" for k, a, b in _leaves(left, right) if k.removeprefix("loop.") not in EXTENDABLE]


def _leaves(left: Any, right: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in {**left, **right}:
            yield from _leaves(left.get(key), right.get(key), f"{prefix}{key}.")
    elif left != right:
        yield prefix.rstrip("."), left, right
