"""Training checkpoints of a folder: only whole ones count, wherever they lie."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from raysal.archive.uris import join, write_bytes
from raysal.train import saved


def put(root: str, step: int, miou: float | None = None, without: str = "", cut: str = "") -> str:
    """A checkpoint folder as a training leaves it, lacking one file, or with one cut short."""
    weights = save({"w": torch.arange(1000.0)})
    info = json.dumps({"parents": {"metrics": None if miou is None else {"miou": miou}}}).encode()
    files = {"model.safetensors": weights, "model.json": info, "state.safetensors": weights, "state.json": b'{"step": 1}'}
    assert set(files) == set(saved.FILES)
    for name, data in files.items():
        if name != without:
            write_bytes(join(root, saved.name(step), name), data[: len(data) // 2] if name == cut else data)
    return saved.name(step)


def test_the_newest_is_the_newest_whole_one_and_no_copy_stays(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    with saved.newest(root) as none:
        assert none is None
    put(root, 3)
    put(root, 20)
    for n, file in enumerate(saved.FILES):
        put(root, 30 + n, without=file)
        put(root, 40 + n, cut=file)
    with saved.newest(root) as found:
        assert found is not None
        assert json.loads((found / "state.json").read_text()) == {"step": 1}
        assert [found] == list(copies.iterdir()) if root.startswith("memory://") else found.name == saved.name(20)
    assert not list(copies.iterdir())


def test_the_best_is_the_later_of_equals_and_never_an_unevaluated_one(root: str) -> None:
    put(root, 1, 0.5)
    put(root, 2, 0.5)
    put(root, 3, 0.4)
    put(root, 4)
    put(root, 5, 0.9, without="model.safetensors")
    assert saved.best(root) == saved.name(2)


@pytest.mark.parametrize("miou", [None, 0.25])
def test_metrics_are_those_of_the_checkpoint(root: str, miou: float | None) -> None:
    name = put(root, 7, miou)
    assert saved.metrics(join(root, name)) == (None if miou is None else {"miou": miou})
