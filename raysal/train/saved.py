"""The training checkpoints in a folder, ``step-00000100/`` and so on: which are whole, which is the last, which the best."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from raysal.archive.uris import absolute, exists, is_local, join, list_names, read_bytes
from raysal.train.plan import CHECKPOINT_FILES

FILES = (*CHECKPOINT_FILES, "state.safetensors", "state.json")


def name(step: int) -> str:
    """Name of the checkpoint folder after a number of steps."""
    return f"step-{step:08d}"


def names(folder: str) -> list[str]:
    """Names of the checkpoint folders under a URI that lack no file, oldest first."""
    return [n for n in list_names(folder) if n.startswith("step-") and all(exists(join(folder, n, file)) for file in FILES)]


@contextmanager
def newest(folder: str) -> Iterator[Path | None]:
    """The newest whole checkpoint, on this machine's disk while the context lasts; None where there is none. What a kill cut short
    is passed over."""
    for candidate in reversed(names(folder)):
        with _on_disk(join(folder, candidate)) as found:
            if _is_whole(found):
                yield found
                return
    yield None


def best(folder: str) -> str:
    """Name of the checkpoint with the best val mIoU, the later one of equals; the last where none was evaluated."""
    return max(names(folder), key=lambda n: (_miou(join(folder, n)), n))


def metrics(uri: str) -> dict | None:
    """The evaluation that a checkpoint carries, None where it was not evaluated."""
    found: dict | None = json.loads(read_bytes(join(uri, "model.json")))["parents"]["metrics"]
    return found


def _miou(uri: str) -> float:
    value = (metrics(uri) or {}).get("miou")
    return -1.0 if value is None else float(value)


@contextmanager
def _on_disk(uri: str) -> Iterator[Path]:
    if is_local(uri):
        yield Path(absolute(uri))
        return
    with tempfile.TemporaryDirectory(prefix="raysal-resume-") as copy:
        for file in FILES:
            (Path(copy) / file).write_bytes(read_bytes(join(uri, file)))
        yield Path(copy)


def _is_whole(folder: Path) -> bool:
    try:
        for file in FILES:
            if file.endswith(".json"):
                json.loads((folder / file).read_text())
            else:
                safe_open(folder / file, "pt")  # reads the header alone, and compares it with the file's length
    except (OSError, ValueError, SafetensorError):
        return False
    return True
