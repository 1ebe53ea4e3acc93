"""A few images are scored and labelled in this process: no Ray is started, and the output is as any other."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from PIL import Image

from raysal.archive.tables import read_table
from raysal.config import Config, RuntimeConfig, build
from raysal.datasets.synthetic import write_archive
from raysal.errors import InputError, ResourceError
from raysal.images.masks import decode_mask
from raysal.labels import IGNORE, S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.metrics import ClassReliability
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.stream import archive as archives
from raysal.stream.archive import label_archive, open_manifest
from raysal.stream.label import TRUST, label_forecast, label_pool
from raysal.stream.score import score_forecast, score_pool
from tests.unit import test_products as products

IMAGES = 10
MODEL = {"arch": "Unet", "encoder": "resnet18"}


def configured(**label: float) -> Config:
    return build({"model": MODEL, "label": label, "score": {"embedding_dim": 4, "batch_size": 2}, "runtime": {"kind": "eager"}})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """archive/images with scenes, checkpoint/ with a model that was measured on nothing real."""
    folder, cfg = tmp_path_factory.mktemp("small"), configured()
    write_archive(str(folder / "archive"), IMAGES, 1, 32, 0)
    for left in sorted((folder / "archive" / "images").iterdir())[IMAGES:]:
        left.unlink()
    reliability = ClassReliability(S5MARS.n_classes)
    reliability.counts[0], reliability.counts[1] = 100, (torch_ramp() * 100).round()
    metrics = {"reliability": reliability.counts.tolist(), "miou": 0.5}
    info = ModelInfo(S5MARS, cfg.model, input_scale=1.0, tile_px=32, parents={"metrics": metrics})
    save(str(folder / "checkpoint"), TwoBranch(cfg.model, S5MARS.n_classes, 0), info)
    return folder


def torch_ramp():  # type: ignore[no-untyped-def]
    """Right as often as sure: accuracy of bin i is i / n."""
    import torch

    return torch.linspace(0, 1, 100).expand(S5MARS.n_classes, 100)


def images(place: Path) -> pa.Table:
    return open_manifest(str(place / "archive" / "images"))


def test_no_ray_is_started_and_every_image_has_its_row(place: Path, tmp_path: Path) -> None:
    out, table = str(tmp_path / "labels"), images(place)
    dones: list[int] = []
    summary = label_pool(table, str(place / "checkpoint"), out, configured(), lambda done, *_: dones.append(done), rows_per_shard=4)
    assert not ray.is_initialized()
    assert (summary.rows, summary.done, summary.counts["ok"], dones) == (IMAGES, IMAGES, IMAGES, [4, 8, 10])
    assert sorted(read_table(out)["id"].to_pylist()) == sorted(table["id"].to_pylist())
    assert label_pool(table, str(place / "checkpoint"), out, configured()).done == 0
    scores = score_pool(table, str(place / "checkpoint"), str(tmp_path / "scores"), configured())
    assert scores.counts["ok"] == IMAGES and read_table(str(tmp_path / "scores"))["entropy"].null_count == 0


def test_a_folder_holds_the_rows_of_one_runtime(place: Path, tmp_path: Path) -> None:
    out, table, model = str(tmp_path / "labels"), images(place), str(place / "checkpoint")
    half = configured().model_copy(update={"runtime": RuntimeConfig(kind="eager", precision="bfloat16", agreement=0.0)})
    assert label_pool(table, model, out, configured()).runtime == "eager float32"
    # The digest of the configuration tells too; `auto` may mean another thing tomorrow under the same digest.
    identity = json.loads((tmp_path / "labels" / "_RUN.json").read_text())
    assert identity["runtime"] == "eager float32"
    with pytest.raises(InputError, match="another run"):
        label_pool(table, model, out, half)
    (tmp_path / "labels" / "_RUN.json").write_text(json.dumps(identity | {"runtime": "openvino float32"}))
    with pytest.raises(InputError, match="runtime openvino float32, now eager float32"):
        label_pool(table, model, out, configured())
    assert label_pool(table, model, out, half, replace=True).runtime == "eager bfloat16"
    assert json.loads((tmp_path / "labels" / "_SUCCESS").read_text())["runtime"] == "eager bfloat16"


def test_pixels_that_are_not_sure_enough_abstain_and_the_thresholds_are_told(place: Path, tmp_path: Path) -> None:
    cfg, wanted = configured(), 0.6
    label_pool(images(place), str(place / "checkpoint"), str(tmp_path / "all"), cfg)
    label_pool(images(place), str(place / "checkpoint"), str(tmp_path / "sure"), configured(precision=wanted))
    told = json.loads((tmp_path / "sure" / TRUST).read_text())["kept"]
    assert told["precision"] == wanted
    thresholds = set(told["threshold"].values())
    assert len(thresholds) == 1 and all(reached >= wanted for reached in told["reached"].values())
    kept = 0
    every, some = ({row["id"]: row for row in read_table(str(tmp_path / name)).to_pylist()} for name in ("all", "sure"))
    for whole, sure in ((every[i], some[i]) for i in every):
        a, b = (decode_mask(row["mask_png"], 10**6, row["uri"]) for row in (whole, sure))
        assert (a == b)[b != IGNORE].all()
        assert sure["abstained"] == pytest.approx((b == IGNORE).mean())
        assert sure["confidence"] is None or sure["confidence"] >= min(thresholds)
        kept += int((b != IGNORE).sum())
    assert 0 < kept < IMAGES * 32 * 32
    with pytest.raises(InputError, match="rows of another run"):
        label_pool(images(place), str(place / "checkpoint"), str(tmp_path / "sure"), configured(precision=0.7))


def test_a_model_that_was_never_measured_promises_no_precision(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "checkpoint", tmp_path / "checkpoint")
    info = json.loads((tmp_path / "checkpoint" / "model.json").read_text())
    info["parents"]["metrics"] = None
    (tmp_path / "checkpoint" / "model.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="never measured on val"):
        label_pool(images(place), str(tmp_path / "checkpoint"), str(tmp_path / "out"), configured(precision=0.9))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["label", "score"])
def test_a_forecast_counts_what_is_missing_and_changes_nothing(place: Path, tmp_path: Path, kind: str) -> None:
    pool, forecast = {"label": (label_pool, label_forecast), "score": (score_pool, score_forecast)}[kind]
    out, model, table = tmp_path / "out", str(place / "checkpoint"), images(place)
    found = forecast(table, model, str(out), configured())
    assert (found.rows, found.todo, found.sampled, found.counts) == (IMAGES, IMAGES, IMAGES, {"ok": IMAGES})
    assert found.seconds > 0 and found.load_seconds > 0 and found.bytes_written > 0
    assert found.bytes_read == sum(p.stat().st_size for p in (place / "archive" / "images").iterdir())
    assert not out.exists()
    pool(table.slice(0, 7), model, str(out), configured())
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    again = forecast(table, model, str(out), configured())
    assert (again.rows, again.todo) == (IMAGES, 3) and "3 of 10 images to do" in str(again)
    assert "nothing to do" in str(forecast(table.slice(0, 7), model, str(out), configured()))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_new_images_are_labelled_while_a_place_is_watched(place: Path, tmp_path: Path) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "labels"
    inbox.mkdir()
    scenes = sorted((place / "archive" / "images").iterdir())
    shutil.copy(scenes[0], inbox)
    model = json.dumps(MODEL)
    command = [sys.executable, "-m", "raysal", "label", str(place / "checkpoint"), str(inbox), "--out", str(out), "--watch", "1"]
    said = tmp_path / "said.txt"
    with said.open("w") as stdout:
        process = subprocess.Popen(
            [*command, "--set", f"model={model}"],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )

    def told() -> int:
        return said.read_text().count("1 of ")

    try:
        for wanted in (1, 2, 3):
            if wanted > 1:
                shutil.copy(scenes[wanted - 1], inbox)
            deadline = time.monotonic() + 400
            while told() < wanted:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline, "the new image was never labelled"
                time.sleep(0.1)
            assert len(read_table(str(out), ["id"])) == wanted
        assert psutil.Process(process.pid).is_running()
    finally:
        process.terminate()
        process.communicate(timeout=240)
    assert told() == 3


def test_a_watched_place_loads_the_model_once_and_leaves_files_that_are_being_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, scenes, loads = tmp_path / "inbox", sorted((place / "archive" / "images").iterdir()), []
    inbox.mkdir()
    monkeypatch.setattr(Predictor, "load", lambda *args, load=Predictor.load: loads.append(1) or load(*args))
    looks = label_archive(str(inbox), str(place / "checkpoint"), str(tmp_path / "labels"), configured(), lambda *_: None, print, every_s=60)

    def arrive(*ages: tuple[int, float]) -> None:
        for scene, seconds in ages:
            shutil.copy(scenes[scene], inbox)
            os.utime(inbox / scenes[scene].name, (time.time() - seconds,) * 2)

    # While nothing is looked at, files come; the clock of the third one's writer is ahead, the fourth is still growing.
    pauses = iter([lambda: arrive((1, 900), (2, -900), (3, 0)), lambda: arrive((3, 900)), lambda: None])
    monkeypatch.setattr(archives, "time", SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=lambda _: next(pauses)()))
    arrive((0, 900))
    assert [(look.done, look.rows) for look in islice(looks, 3)] == [(1, 1), (2, 3), (1, 4)]
    assert len(loads) == 1


def test_images_over_a_limit_are_done_in_the_same_folder_once_it_is_raised(place: Path, tmp_path: Path) -> None:
    out, model, cfg = str(tmp_path / "labels"), str(place / "checkpoint"), configured()
    narrow = cfg.model_copy(update={"data": cfg.data.model_copy(update={"max_pixels": 32 * 32 - 1})})
    assert label_pool(images(place), model, out, narrow).counts["limit"] == IMAGES
    assert label_pool(images(place), model, out, cfg).done == 0
    again = label_pool(images(place), model, out, cfg, retry_failed=True)
    assert (again.done, again.counts["ok"]) == (IMAGES, IMAGES)
    other = cfg.model_copy(update={"data": cfg.data.model_copy(update={"black_border": not cfg.data.black_border})})
    with pytest.raises(InputError, match="another run"):
        label_pool(images(place), model, out, other)


def test_a_full_disk_for_temporary_files_is_no_images_fault(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "attached.IMG").write_bytes(products.attached(np.ones((40, 36), ">i2")))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(ResourceError, match="no space left for temporary files; free some, or name another place by TMPDIR"):
        label_pool(open_manifest(str(archive)), str(place / "checkpoint"), str(tmp_path / "labels"), configured())


def test_archive_products_get_masks_at_their_size_and_no_data_abstains(place: Path, tmp_path: Path) -> None:
    archive, rng = tmp_path / "archive", np.random.default_rng(0)
    archive.mkdir()
    wide_HW = rng.integers(100, 4096, (48, 70)).astype(">i2")
    wide_HW[:, :9] = 0
    (archive / "attached.IMG").write_bytes(products.attached(wide_HW, "  MISSING_CONSTANT = 0\r\n"))
    (archive / "detached.raw").write_bytes(wide_HW.tobytes())
    (archive / "detached.xml").write_bytes(products.pds4(wide_HW, "SignedMSB2", ("Line", "Sample"), "detached.raw"))
    (archive / "plain.vic").write_bytes(products.vicar(rng.integers(1, 256, (3, 40, 36), dtype=np.uint8), "BYTE"))
    Image.new("RGB", (33, 44)).save(archive / "black.png")
    (archive / "lost.dat").write_bytes(b"nothing")
    (archive / "lost.xml").write_bytes(b"<html>404</html>")
    table = open_manifest(str(archive))
    label_pool(table, str(place / "checkpoint"), str(tmp_path / "labels"), configured())
    rows = {Path(row["uri"]).name: row for row in read_table(str(tmp_path / "labels")).to_pylist()}
    masks = {name: decode_mask(row["mask_png"], 2**20, name) for name, row in rows.items() if row["status"] == "ok"}
    assert {name: mask_HW.shape for name, mask_HW in masks.items()} == {
        "attached.IMG": (48, 70),
        "detached.raw": (48, 70),
        "plain.vic": (40, 36),
        "black.png": (44, 33),
    }
    np.testing.assert_array_equal(masks["attached.IMG"] == IGNORE, wide_HW == 0)  # by the label's code
    np.testing.assert_array_equal(masks["detached.raw"] == IGNORE, wide_HW == 0)  # a border, without a code
    assert not (masks["plain.vic"] == IGNORE).any() and (masks["black.png"] == IGNORE).all()
    assert rows["black.png"]["abstained"] == 1 and rows["black.png"]["confidence"] is None
    assert rows["lost.dat"]["status"] == "decode" and "lost.dat" in rows["lost.dat"]["error"]
    assert score_pool(table, str(place / "checkpoint"), str(tmp_path / "scores"), configured()).counts["ok"] == 4
