"""The streams keep their promises on a real Ray: every image one row, scores that no layout changes, deaths that cost nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raysal.answers import embed
from raysal.archive.tables import read_table, scores_schema, write_table
from raysal.labels import S5MARS
from raysal.model.checkpoint import digest_at
from raysal.stream import manifest as manifests
from raysal.stream.score import score_pool
from tests.ray.scenes import DIM, SCORES, assert_same_scores, by_id, configured, manifest_at

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_runtime")]


def test_every_image_is_one_row_of_the_schema(scored, checkpoint: str, archive: Path) -> None:  # type: ignore[no-untyped-def]
    rows, _, summary, out = scored
    manifest = manifest_at(archive)
    assert set(rows) == set(manifest["id"].to_pylist())
    assert summary.rows == summary.counts["ok"] == 42
    schema = read_table(str(out)).schema
    assert schema.equals(scores_schema(SCORES, DIM, S5MARS), check_metadata=True)
    for image_id, uri in zip(manifest["id"].to_pylist(), manifest["uri"].to_pylist(), strict=True):
        row = rows[image_id]
        assert (row["uri"], row["status"], row["error"], row["model_digest"]) == (uri, "ok", None, digest_at(checkpoint))
        assert (row["width"], row["height"]) == Image.open(uri).size
        assert sum(row["class_fractions"]) == pytest.approx(1, abs=1e-5)
        assert np.linalg.norm(np.array(row["embedding"], dtype=np.float32)) == pytest.approx(1, abs=5e-3)
    for name in SCORES:
        assert np.std([row[name] for row in rows.values()]) > 1e-4, f"{name} is the same for all images: the test would show nothing"


def test_the_summary_is_left_beside_the_shards(scored, checkpoint: str) -> None:  # type: ignore[no-untyped-def]
    _, calls, summary, out = scored
    assert json.loads((out / "_SUCCESS").read_text()) == summary.to_dict()
    assert summary.model_digest == digest_at(checkpoint)
    assert summary.counts == {"ok": 42, "fetch": 0, "decode": 0, "limit": 0, "model": 0}
    assert [call[:2] for call in calls] == [(42, 42)]
    assert (summary.done, summary.others) == (42, 0)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith("part-")) == ["_RUN.json", "_SUCCESS", "_rows.pq"]


@pytest.mark.parametrize(("shards", "batch_size", "actors"), [(3, 1, 2), (7, 8, 1)])
def test_shards_order_and_batches_change_no_score(  # type: ignore[no-untyped-def]
    scored, checkpoint: str, archive: Path, tmp_path: Path, shards: int, batch_size: int, actors: int
) -> None:
    manifest = manifest_at(archive)
    shuffled = manifest.take(np.random.default_rng(shards).permutation(manifest.num_rows))
    cfg = configured(score_actors=actors)
    cfg = cfg.model_copy(update={"score": cfg.score.model_copy(update={"batch_size": batch_size})})
    dones: list[int] = []
    score_pool(shuffled, checkpoint, str(tmp_path / "out"), cfg, None, lambda done, *_: dones.append(done), -(-42 // shards))
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == shards
    assert len(dones) == shards
    assert dones == sorted(dones)
    assert dones[-1] == 42
    assert_same_scores(scored[0], by_id(tmp_path / "out"))


def test_a_manifest_too_long_for_memory_is_streamed_to_the_same_scores(  # type: ignore[no-untyped-def]
    scored, checkpoint: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_at(archive)
    write_table(str(tmp_path / "manifest" / "a.parquet"), manifest.slice(0, 20))
    write_table(str(tmp_path / "manifest" / "b.parquet"), manifest.slice(20))
    monkeypatch.setattr(manifests, "IN_MEMORY_ROWS", 10)
    out = tmp_path / "out"
    score_pool(str(tmp_path / "manifest"), checkpoint, str(out), configured(), rows_per_shard=9)
    assert sorted(read_table(str(p)).num_rows for p in out.glob("part-*.parquet")) == [6, 9, 9, 9, 9]
    assert_same_scores(scored[0], by_id(out))


def test_masks_of_the_pool_are_never_read(scored, checkpoint: str, archive: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    masks = sorted((archive / "masks").iterdir())
    contents = [m.read_bytes() for m in masks]
    for mask, other in zip(masks[: len(masks) // 2], contents[1:], strict=False):
        mask.write_bytes(other)
    for mask in masks[len(masks) // 2 :]:
        mask.unlink()
    try:
        score_pool(manifest_at(archive), checkpoint, str(tmp_path / "out"), configured(in_process=500), rows_per_shard=100)
    finally:
        for mask, content in zip(masks, contents, strict=True):
            mask.write_bytes(content)
    assert_same_scores(scored[0], by_id(tmp_path / "out"), atol=0)


def test_embeddings_keep_distances_and_their_length() -> None:
    rng = np.random.default_rng(0)
    few, many = (torch.from_numpy(rng.normal(size=(40, d)).astype(np.float32)) for d in (8, 512))
    padded = embed(few, 128).astype(np.float32)
    unit = torch.nn.functional.normalize(few, dim=1)
    np.testing.assert_allclose(padded @ padded.T, (unit @ unit.T).numpy(), atol=2e-3)
    many = torch.nn.functional.normalize(many + 2 * torch.from_numpy(rng.normal(size=(1, 512)).astype(np.float32)), dim=1)
    projected = embed(many, 128)
    assert (projected.shape, projected.dtype) == ((40, 128), np.float16)
    np.testing.assert_allclose(np.linalg.norm(projected.astype(np.float32), axis=1), 1, atol=2e-3)
    np.testing.assert_array_equal(projected[7:8], embed(many[7:8], 128))
    error = projected.astype(np.float32) @ projected.T.astype(np.float32) - (many @ many.T).numpy()
    assert np.abs(error).mean() < 1 / np.sqrt(128)
    assert embed(many, 0).shape == (40, 0)
