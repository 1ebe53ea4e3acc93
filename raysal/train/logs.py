"""Training logs: plain JSON lines anywhere, and TensorBoard event files beside them on local disks."""

from __future__ import annotations

import json

from raysal.archive.uris import exists, is_local, join, open_fs, read_bytes, write_bytes

METRICS_FILE = "metrics.jsonl"


class Log:
    """Appends records to ``metrics.jsonl`` of a folder; one writer."""

    def __init__(self, folder: str) -> None:
        self.folder, self.uri, self._board = folder, join(folder, METRICS_FILE), None

    def start(self, first_step: int) -> None:
        """Drops records of steps after `first_step`: a resumed training will do them again."""
        kept = [r for r in read_log(self.folder) if r.get("step", r.get("start", 0)) <= first_step] if first_step else []
        write_bytes(self.uri, "".join(json.dumps(r) + "\n" for r in kept).encode())
        if is_local(self.folder):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(join(self.folder, "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def add(self, record: dict) -> None:
        """Adds a line, and a point for each number in it."""
        fs, path = open_fs(self.uri)
        with fs.open(path, "ab") as file:
            file.write((json.dumps(record) + "\n").encode())
        if self._board is not None and "step" in record:
            for name, value in _numbers(record):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Writes out what TensorBoard's writer still holds."""
        if self._board is not None:
            self._board.close()
            self._board = None


def read_log(folder: str) -> list[dict]:
    """All whole records so far; a line cut short by a kill is left out."""
    uri = join(folder, METRICS_FILE)
    if not exists(uri):
        return []
    records = []
    for line in read_bytes(uri).splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _numbers(record: dict, prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if key in ("step", "confusion", "calibration"):
            continue
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + key, float(value)))
    return found
