"""Nothing that goes wrong stops a stream, is lost or hidden: deaths, bad images, misuse."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray.data
import torch
from PIL import Image

import raysal
from raysal.archive.tables import labels_schema, manifest_schema, read_table, scores_schema, write_table
from raysal.config import Config, ScoreConfig
from raysal.datasets.synthetic import scene
from raysal.errors import CheckpointError, ConfigError, InputError, RaysalError
from raysal.images.masks import decode_mask, encode_mask
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, digest_at, save
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.query.scores import score_images
from raysal.stream import manifest as manifests, pool
from raysal.stream.label import label_pool
from raysal.stream.pool import run_pool
from raysal.stream.score import ScoreImages, score_pool
from raysal.stream.worker import Picture, Row, Task
from tests.ray.scenes import DIM, SCORES, actor_pids, assert_same_scores, by_id, configured, manifest_at

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_runtime")]


def test_an_actor_that_is_killed_costs_no_row_and_doubles_none(  # type: ignore[no-untyped-def]
    scored, checkpoint: str, archive: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(done: int, total: int, counts: dict[str, int]) -> None:
        if not killed and done < total // 2:
            killed.append(actor_pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    score_pool(manifest_at(archive), checkpoint, str(tmp_path / "out"), configured(), None, kill_one, 3)
    assert killed
    assert not psutil.pid_exists(killed[0]) or psutil.Process(killed[0]).status() == psutil.STATUS_ZOMBIE
    assert_same_scores(scored[0], by_id(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("_attempt*"))


class DiesOver(ScoreImages):
    """Stands for an image that crashes a decoder in C or takes all memory: the process is gone, no exception is seen."""

    def rows(self, pictures: Sequence[Picture]) -> list[Row]:
        if any(p.source.uri.endswith("005.png") for p in pictures):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rows(pictures)


class FailsOver(ScoreImages):
    """Stands for a network that can't take one image."""

    def rows(self, pictures: Sequence[Picture]) -> list[Row]:
        if any(p.source.uri.endswith("005.png") for p in pictures):
            raise RuntimeError("no kernel for this shape")
        return super().rows(pictures)


class RefusesToStart(ScoreImages):
    def start(self) -> None:
        raise InputError("the licence of this model has run out; renew it")


class Crashes(ScoreImages):
    def common(self) -> Row:
        raise ZeroDivisionError("a mistake of ours")


def run(worker: type[ScoreImages], manifest: pa.Table, checkpoint: str, out: Path, rows: int, **compute: int) -> pool.Summary:
    schema = scores_schema(SCORES, DIM)
    return run_pool(worker, manifest, checkpoint, str(out), schema=schema, cfg=configured(**compute), rows_per_shard=rows)


@pytest.mark.slow
def test_an_image_that_kills_every_process_becomes_a_row(scored, checkpoint: str, archive: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    manifest = manifest_at(archive).slice(0, 12)
    summary = run(DiesOver, manifest, checkpoint, tmp_path / "out", rows=6, score_actors=1)
    assert summary.counts["model"] == 1
    rows = by_id(tmp_path / "out")
    bad = rows.pop(manifest["id"][5].as_py())
    assert bad["status"] == "model"
    assert "005.png" in bad["error"]
    assert "process died" in bad["error"]
    assert_same_scores(rows, {i: scored[0][i] for i in rows})
    assert not list((tmp_path / "out").glob("_attempt*"))


def test_an_image_the_network_fails_on_costs_only_itself(scored, checkpoint: str, archive: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    manifest = manifest_at(archive).slice(0, 12)
    assert run(FailsOver, manifest, checkpoint, tmp_path / "out", rows=12, in_process=500).counts["model"] == 1
    rows = by_id(tmp_path / "out")
    assert "no kernel for this shape" in rows.pop(manifest["id"][5].as_py())["error"]
    assert_same_scores(rows, {i: scored[0][i] for i in rows})


def test_what_an_actor_refuses_reaches_the_caller_as_it_was_said(checkpoint: str, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^the licence of this model has run out; renew it$"):
        run(RefusesToStart, manifest_at(archive), checkpoint, tmp_path / "out", rows=42, score_actors=1)
    with pytest.raises(RaysalError, match="broke down: ZeroDivisionError: a mistake of ours;"):
        run(Crashes, manifest_at(archive), checkpoint, tmp_path / "crashed", rows=42, score_actors=1)
    assert not list(tmp_path.glob("*/_SUCCESS"))


STATUS = {
    "good.png": "ok", "good2.jpg": "ok", "excluded.png": "ok", "truncated.jpg": "decode", "empty.png": "decode", "text.png": "decode",
    "absent.png": "fetch", "heavy.jpg": "limit", "large.png": "limit", "small_exclude.png": "decode", "lost_exclude.png": "fetch",
}  # fmt: skip
EXCLUDE = {"excluded.png": "border.mask", "small_exclude.png": "wrong.mask", "lost_exclude.png": "lost.mask"}


def limited() -> Config:
    cfg = configured(in_process=500)
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"max_bytes": 100_000, "max_pixels": 200 * 200})})


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The manifest of good images and one of every kind of bad one; `STATUS` says which must come out how."""
    root = tmp_path_factory.mktemp("broken")
    good, _ = scene(0, 0, 64)
    for name in ("good.png", "excluded.png", "small_exclude.png", "lost_exclude.png"):
        Image.fromarray(good).save(root / name)
    Image.fromarray(scene(0, 1, 64)[0]).save(root / "good2.jpg")
    whole = (root / "good2.jpg").read_bytes()
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("<html>404</html>")
    (root / "heavy.jpg").write_bytes(whole + b"\0" * 200_000)
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(root / "large.png")
    border = np.zeros((64, 64), np.uint8)
    border[:, :32] = 1
    (root / "border.mask").write_bytes(encode_mask(border))
    (root / "wrong.mask").write_bytes(encode_mask(border[:10]))
    rows = [
        {"id": f"{n:032x}", "uri": str(root / name), "exclude": [str(root / EXCLUDE[name])] if name in EXCLUDE else None}
        for n, name in enumerate(STATUS)
    ]
    return pa.Table.from_pylist(rows, schema=manifest_schema())


@pytest.fixture(scope="module")
def broken_scored(broken: pa.Table, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pool.Summary]:
    out = tmp_path_factory.mktemp("broken_scored") / "out"
    return out, score_pool(broken, checkpoint, str(out), limited(), rows_per_shard=4)


@pytest.fixture(scope="module")
def broken_labeled(broken: pa.Table, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pool.Summary]:
    out = tmp_path_factory.mktemp("broken_labeled") / "out"
    return out, label_pool(broken, checkpoint, str(out), limited(), rows_per_shard=4)


@pytest.mark.parametrize("stream", ["broken_scored", "broken_labeled"])
def test_bad_images_are_rows_with_a_reason_and_stop_nothing(
    stream: str, broken: pa.Table, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    out, summary = request.getfixturevalue(stream)
    assert summary.counts == {"ok": 3, "fetch": 2, "decode": 4, "limit": 2, "model": 0}
    rows = {Path(row["uri"]).name: row for row in by_id(out).values()}
    assert {name: row["status"] for name, row in rows.items()} == STATUS
    folder = str(Path(broken["uri"][0].as_py()).parent)
    for row in (row for name, row in rows.items() if STATUS[name] == "ok"):
        assert row["error"] is None
        assert (row["width"], row["height"]) == (64, 64)
    for row in (row for name, row in rows.items() if STATUS[name] != "ok"):
        assert folder in row["error"]
        assert row["width"] is None
        assert row["class_fractions"] is None
        assert row["model_digest"] == digest_at(checkpoint)


def test_rows_with_a_bad_status_are_valid_input_again(
    broken_scored: tuple[Path, pool.Summary], broken: pa.Table, checkpoint: str, tmp_path: Path
) -> None:
    failed = read_table(str(broken_scored[0])).filter(pa.compute.field("status") != "ok")
    summary = score_pool(failed, checkpoint, str(tmp_path / "out"), limited())
    assert summary.rows == 8
    # Without the manifest's exclude column, the two images whose exclude masks were bad are good.
    assert summary.counts == {"ok": 2, "fetch": 1, "decode": 3, "limit": 2, "model": 0}


def test_scores_of_an_excluded_half_are_those_of_the_other_half(broken_scored: tuple[Path, pool.Summary], checkpoint: str) -> None:
    row = next(r for r in by_id(broken_scored[0]).values() if r["uri"].endswith("excluded.png"))
    z1, z2 = (z[..., 8:] for z in Predictor.load(checkpoint).logits([np.array(Image.open(row["uri"]))], "decoder"))
    half = score_images(z1, z2, torch.ones(1, 64, 32, dtype=torch.bool), ScoreConfig(scores=("entropy", "uncertainty")))
    assert row["entropy"] == pytest.approx(half["entropy"][0], abs=1e-6)
    assert row["uncertainty"] == pytest.approx(half["uncertainty"][0], abs=1e-6)
    np.testing.assert_allclose(row["class_fractions"], half["class_fractions"][0], atol=1e-6)


def test_masks_are_the_predictors_to_the_byte(broken_labeled: tuple[Path, pool.Summary], checkpoint: str) -> None:
    predictor = Predictor.load(checkpoint)
    assert read_table(str(broken_labeled[0])).schema.equals(labels_schema(predictor.info.label_set), check_metadata=True)
    for row in by_id(broken_labeled[0]).values():
        name = Path(row["uri"]).name
        if STATUS[name] != "ok":
            assert row["mask_png"] is None
            continue
        found = predictor.predict([np.array(Image.open(row["uri"]).convert("RGB"))])
        mask_HW, kept = found.masks[0].copy(), np.ones((64, 64), bool)
        if name == "excluded.png":
            kept[:, :32] = False
            mask_HW[:, :32] = 255
        np.testing.assert_array_equal(decode_mask(row["mask_png"], 10**6, name), mask_HW)
        assert row["abstained"] == pytest.approx(1 - kept.mean())
        assert row["confidence"] == pytest.approx(found.confidence[0][kept].mean(), abs=1e-6)
        counts = np.bincount(mask_HW[kept], minlength=S5MARS.n_classes)
        np.testing.assert_allclose(row["class_fractions"], counts / counts.sum(), atol=1e-6)
        assert row["source_sha256"] == hashlib.sha256(Path(row["uri"]).read_bytes()).hexdigest()
        assert row["config_digest"] == limited().digest()
        assert row["raysal_version"] == raysal.__version__


def test_a_model_that_gives_nan_gives_no_scores(archive: Path, tmp_path: Path) -> None:
    cfg = configured()
    net = TwoBranch(cfg.model, S5MARS.n_classes, seed=0)
    with torch.no_grad():
        next(net.branches[1].segmentation_head.parameters()).fill_(float("nan"))
    save(str(tmp_path / "checkpoint"), net, ModelInfo(S5MARS, cfg.model, input_scale=1.0, tile_px=64))
    manifest = manifest_at(archive).slice(0, 4)
    summary = score_pool(manifest, str(tmp_path / "checkpoint"), str(tmp_path / "out"), configured(in_process=500))
    assert summary.counts["model"] == 4
    assert all("not finite" in row["error"] and row["entropy"] is None for row in by_id(tmp_path / "out").values())


def test_a_folder_of_other_rows_is_refused_or_replaced_and_a_folder_of_anything_else_is_left_alone(  # type: ignore[no-untyped-def]
    scored, checkpoint: str, archive: Path, tmp_path: Path
) -> None:
    out, manifest = tmp_path / "out", manifest_at(archive)
    out.mkdir()
    write_table(str(out / f"part-{'0' * 24}.parquet"), manifest)  # nobody knows of which model
    (out / f"_attempt-part-{'1' * 24}.parquet.json").write_text("{}")
    some, cfg = manifest.slice(4, 8), configured(in_process=500)
    with pytest.raises(InputError, match="nobody knows the model"):
        score_pool(some, checkpoint, str(out), cfg)
    bonus = [0.5] * S5MARS.n_classes
    score_pool(some, checkpoint, str(out), cfg, class_bonus=bonus, replace=True)
    rows = by_id(out)
    assert set(rows) == set(some["id"].to_pylist())
    for image_id, row in rows.items():  # an equal bonus for every class only scales
        assert row["entropy"] == pytest.approx(scored[0][image_id]["entropy"] / 2, abs=1e-5)
    assert not list(out.glob("_attempt*"))
    with pytest.raises(InputError, match=r"rows of another run \(config digest"):
        score_pool(some, checkpoint, str(out), cfg)
    assert by_id(out) == rows
    with pytest.raises(InputError, match=r"images, masks.*no output"):
        score_pool(manifest, checkpoint, str(archive), configured())
    assert len(list((archive / "images").iterdir())) == 42


def test_a_second_run_does_only_what_is_new(scored, checkpoint: str, archive: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, manifest, cfg = str(tmp_path / "out"), manifest_at(archive), configured(in_process=500)
    score_pool(manifest.slice(0, 12), checkpoint, out, cfg, rows_per_shard=5)
    before = {p: p.read_bytes() for p in Path(out).glob("part-*")}
    again = score_pool(manifest.slice(0, 12), checkpoint, out, cfg, on_progress=lambda *_: pytest.fail("nothing was to be done"))
    assert (again.done, again.rows) == (0, 12)
    grown = score_pool(manifest.slice(4, 16), checkpoint, out, cfg)  # four images are no longer named, eight are new
    assert (grown.rows, grown.done, grown.others, grown.counts["ok"]) == (16, 8, 4, 20)
    assert all(p.read_bytes() == data for p, data in before.items())
    assert_same_scores(by_id(out), {i: scored[0][i] for i in manifest["id"].to_pylist()[:20]})


def test_what_failed_is_listed_and_can_be_tried_again_alone(
    broken_labeled: tuple[Path, pool.Summary], broken: pa.Table, checkpoint: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(broken_labeled[0], out)
    failed = read_table(str(out / "_failed.pq")).to_pylist()
    assert {Path(row["uri"]).name: row["status"] for row in failed} == {n: s for n, s in STATUS.items() if s != "ok"}
    good = {i: row for i, row in by_id(out).items() if row["status"] == "ok"}
    text = next(Path(uri) for uri in broken["uri"].to_pylist() if uri.endswith("text.png"))
    damaged, whole = text.read_bytes(), Image.fromarray(scene(0, 5, 64)[0])
    try:
        whole.save(text)
        summary = label_pool(broken, checkpoint, str(out), limited(), retry_failed=True)
    finally:
        text.write_bytes(damaged)
    assert (summary.done, summary.rows, summary.counts["ok"], summary.counts["decode"]) == (8, 11, 4, 3)
    rows = by_id(out)
    assert {i: rows[i] for i in good} == good  # not done again
    assert len(read_table(str(out / "_failed.pq"))) == 7


def test_an_error_in_the_callback_ends_the_run_and_its_actors(checkpoint: str, archive: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, counts: dict[str, int]) -> None:
        raise KeyboardInterrupt

    before, others = ray.data.DataContext.get_current(), set(actor_pids())
    with pytest.raises(KeyboardInterrupt):
        score_pool(manifest_at(archive), checkpoint, str(tmp_path / "out"), configured(), None, stop, 2)
    assert ray.data.DataContext.get_current() is before
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    deadline = time.monotonic() + 120
    while set(actor_pids()) - others and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not set(actor_pids()) - others


def test_input_that_cannot_be_used_is_refused_before_any_work(checkpoint: str, archive: Path, tmp_path: Path) -> None:
    manifest, out, cfg = manifest_at(archive), str(tmp_path / "out"), configured()
    with pytest.raises(InputError, match="holds no images"):
        score_pool(manifest.slice(0, 0), checkpoint, out, cfg)
    with pytest.raises(InputError, match="no column uri, it has id"):
        score_pool(manifest.select(["id"]), checkpoint, out, cfg)
    with pytest.raises(InputError, match="42 of 84 ids repeat"):
        label_pool(pa.concat_tables([manifest, manifest]), checkpoint, out, cfg)
    with pytest.raises(InputError, match=r"does not exist; give a \.parquet file"):
        score_pool(str(tmp_path / "none.parquet"), checkpoint, out, cfg)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        label_pool(manifest, str(tmp_path / "none"), out, cfg)
    with pytest.raises(InputError, match="class_bonus has 3 values"):
        score_pool(manifest, checkpoint, out, cfg, [1.0, 1.0, 1.0])
    with pytest.raises(InputError, match=r"lower compute\.score_actors"):
        score_pool(manifest, checkpoint, out, configured(score_actors=99))
    on = cfg.model_copy(update={"score": cfg.score.model_copy(update={"class_bonus": True})})
    with pytest.raises(ConfigError, match="class_bonus"):
        score_pool(manifest, checkpoint, out, on)
    assert not list(Path(out).glob("part-*"))


def test_images_named_twice_in_a_streamed_manifest_end_the_run(
    checkpoint: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_at(archive).slice(0, 6)
    write_table(str(tmp_path / "manifest.parquet"), pa.concat_tables([manifest, manifest]))
    monkeypatch.setattr(manifests, "IN_MEMORY_ROWS", 1)
    with pytest.raises(InputError, match="6 of 12 ids repeat"):
        score_pool(str(tmp_path / "manifest.parquet"), checkpoint, str(tmp_path / "out"), configured(score_actors=1), rows_per_shard=6)


def test_an_actor_refuses_a_checkpoint_that_changed_meanwhile(checkpoint: str, tmp_path: Path) -> None:
    task = Task(configured(), checkpoint, "0" * 64, str(tmp_path), scores_schema(SCORES, DIM), "cpu", 1, token="mine")
    receipt = ScoreImages(task)(pa.table({"id": ["a"], "uri": ["b"]})).to_pylist()[0]
    assert receipt["error"] == "CheckpointError"
    assert "changed while the run went on" in receipt["message"]
