"""A large image in tiles gets what it would get whole, as far as a network's answer is local."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysal.archive.tables import labels_schema, scores_schema
from raysal.config import ScoreConfig, build
from raysal.datasets.synthetic import scene
from raysal.images.masks import decode_mask
from raysal.images.tiles import Grid
from raysal.model.runtime import Predictor
from raysal.stream.job import prepare
from raysal.stream.label import LabelImages
from raysal.stream.score import ScoreImages
from raysal.stream.worker import Picture, Source
from tests.helpers import tiny_tree
from tests.trained import PX

SIDE, OVERLAP = 192, 64
SCORES = ("entropy", "uncertainty", "margin", "disagreement")


def tiled(trained: Path, **more: object) -> Predictor:
    predictor = Predictor.load(str(trained))
    model = predictor.info.model.model_copy(update={"whole_pixels": 1, "tile_px": SIDE, "overlap_px": OVERLAP, **more})
    predictor.info = replace(predictor.info, model=model)
    return predictor


@pytest.fixture(scope="module")
def panorama() -> np.ndarray:
    """[320, 576, 3]: scenes of the size that the network learnt, side by side, as a mosaic holds more than a frame."""
    rows = [np.concatenate([scene(0, 9 * i + j, PX)[0] for j in range(9)], axis=1) for i in range(5)]
    return np.concatenate(rows)


def test_the_mask_is_the_untiled_one_and_shows_no_seam(trained: Path, panorama: np.ndarray) -> None:
    grid = Grid.over(panorama.shape[:2], SIDE, OVERLAP)
    assert len(grid.rows) == 2 and len(grid.cols) == 4
    whole, pieces = Predictor.load(str(trained)).masks([panorama])[0], tiled(trained).masks([panorama])[0]
    assert len(np.unique(whole)) >= 3
    assert (whole != pieces).mean() < 1e-4  # the network is local (`tests.trained`), so only sums that round otherwise may differ


def test_pieces_cover_the_image_once_and_agree_with_the_mask(trained: Path, panorama: np.ndarray) -> None:
    predictor = tiled(trained)
    seen = np.zeros(panorama.shape[:2], int)
    mask = predictor.masks([panorama])[0]
    for piece in next(predictor.pieces([panorama])):
        seen[piece.rows, piece.cols] += 1
        np.testing.assert_allclose(piece.probabilities.sum(0), 1, atol=1e-5)
        np.testing.assert_array_equal(piece.mask, mask[piece.rows, piece.cols])
        np.testing.assert_array_equal(piece.confidence, piece.probabilities.max(0))
    assert (seen == 1).all()


def test_a_line_of_pixels_counts_as_what_the_network_makes_of_it(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network pads it to a strip 32 px wide: a small file must not cost the memory of an image that large."""
    predictor = tiled(trained, whole_pixels=2**15)
    assert predictor.grid((180, 180)) is None and predictor.grid((1, 1024)) is None
    assert predictor.pixels((1, 2000)) == predictor.pixels((2000, 1)) == 64_000
    half = tiled(trained)
    half.info = replace(half.info, input_scale=0.5)
    assert (half.pixels((1, 2000)), half.pixels((64, 64))) == (32_000, 64 * 64)
    seen: list[int] = []
    engine = predictor._engine
    monkeypatch.setattr(predictor, "_engine", lambda x, branches: seen.append(x[0, 0].numel()) or engine(x, branches))
    for line in (scene(0, 0, PX)[0][:1].repeat(32, axis=1), scene(0, 0, PX)[0][:, :1].repeat(32, axis=0)):
        assert predictor.masks([line])[0].shape == line.shape[:2]
    assert max(seen) <= 2**15 and len(seen) > 2


def test_an_accelerator_takes_no_more_lines_at_once_than_their_strips_allow(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, seen = Predictor.load(str(trained)), []
    engine = predictor._engine
    monkeypatch.setattr(predictor, "_engine", lambda x, branches: seen.append(x[:, 0].numel()) or engine(x, branches))
    monkeypatch.setattr(predictor, "_threads", None)
    monkeypatch.setattr("raysal.model.runtime.PIXELS_AT_ONCE", 2**14)
    assert len(predictor.masks([np.zeros((1, 200, 3), np.uint8)] * 5)) == 5
    assert max(seen) <= 2**14 and len(seen) == 3


def worker_of(kind: type, trained: Path, tmp_path: Path, predictor: Predictor, **score: object):  # type: ignore[no-untyped-def]
    cfg = build(tiny_tree(tmp_path, score={"scores": list(SCORES), **score}))
    info = predictor.info
    schema = scores_schema(SCORES, 8, info.label_set) if kind is ScoreImages else labels_schema(info.label_set)
    table = pa.table({"id": ["a"], "uri": ["a.png"]})
    work = kind(prepare(kind, table, str(trained), str(tmp_path / "out"), schema, cfg, None).task)
    (work.scores if kind is ScoreImages else work.masks).predictor = predictor
    return work


@pytest.mark.parametrize("aggregate", ["mean", "top_q"])
def test_scores_of_tiles_are_those_of_the_whole(trained: Path, panorama: np.ndarray, tmp_path: Path, aggregate: str) -> None:
    valid = np.ones(panorama.shape[:2], bool)
    valid[:, :150] = False
    picture = Picture(Source("a", "a.png"), panorama, valid, "")
    whole, parts = (
        worker_of(ScoreImages, trained, tmp_path, p, aggregate=aggregate).rows([picture])[0]
        for p in (Predictor.load(str(trained)), tiled(trained))
    )
    for name in SCORES:
        assert parts[name] == pytest.approx(whole[name], rel=0.01), name
    np.testing.assert_allclose(parts["class_fractions"], whole["class_fractions"], atol=2e-3)
    assert parts["class_fractions"].sum() == pytest.approx(1, abs=1e-5)


def test_the_embedding_of_tiles_points_where_that_of_the_whole_does(trained: Path, panorama: np.ndarray, tmp_path: Path) -> None:
    picture = Picture(Source("a", "a.png"), panorama, np.ones(panorama.shape[:2], bool), "")
    whole, parts = (
        worker_of(ScoreImages, trained, tmp_path, p).rows([picture])[0]["embedding"].astype(float)
        for p in (Predictor.load(str(trained)), tiled(trained))
    )
    assert float(parts @ whole) > 0.95


def test_scores_of_tiles_do_not_depend_on_how_many_run_at_once(trained: Path, panorama: np.ndarray, tmp_path: Path) -> None:
    threads, seen = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        work = worker_of(ScoreImages, trained, tmp_path, tiled(trained))
        torch.set_num_threads(n)  # the worker sets its own
        row = work.rows([Picture(Source("a", "a.png"), panorama, np.ones(panorama.shape[:2], bool), "")])[0]
        seen.append([row[name] for name in SCORES] + row["class_fractions"].tolist() + row["embedding"].tolist())
    torch.set_num_threads(threads)
    assert seen[0] == seen[1] == seen[2]


def test_a_network_that_is_not_finite_is_not_scored_0(trained: Path, panorama: np.ndarray, tmp_path: Path) -> None:
    predictor = tiled(trained)
    predictor._engine = lambda x, branches: tuple(t * float("nan") for t in predictor.model.core(x, branches))
    picture = Picture(Source("a", "a.png"), panorama, np.ones(panorama.shape[:2], bool), "")
    for aggregate in ("mean", "top_q"):
        with pytest.raises(ValueError, match="not finite"):
            worker_of(ScoreImages, trained, tmp_path, predictor, aggregate=aggregate, embedding_dim=0).rows([picture])
    with pytest.raises(ValueError, match="not finite"):
        worker_of(LabelImages, trained, tmp_path, predictor).rows([picture])


def test_what_is_not_valid_does_not_count_in_any_tile(trained: Path, panorama: np.ndarray, tmp_path: Path) -> None:
    valid = np.zeros(panorama.shape[:2], bool)
    work = worker_of(ScoreImages, trained, tmp_path, tiled(trained))
    row = work.rows([Picture(Source("a", "a.png"), panorama, valid, "")])[0]
    assert all(row[name] == 0 for name in SCORES) and row["class_fractions"].sum() == 0


def test_a_labelled_mosaic_is_the_predictors_mask_with_its_border_left_out(trained: Path, panorama: np.ndarray, tmp_path: Path) -> None:
    valid = np.ones(panorama.shape[:2], bool)
    valid[:40] = False
    work = worker_of(LabelImages, trained, tmp_path, tiled(trained))
    row = work.rows([Picture(Source("a", "a.png"), panorama, valid, "0" * 64)])[0]
    mask = decode_mask(row["mask_png"], 10**9, "a")
    expected = np.where(valid, tiled(trained).masks([panorama])[0], 255)
    np.testing.assert_array_equal(mask, expected)
    assert row["abstained"] == pytest.approx(40 / 320) and 0 < row["confidence"] <= 1


def test_dropout_draws_differ_from_tile_to_tile_and_not_from_call_to_call(trained: Path, panorama: np.ndarray, tmp_path: Path) -> None:
    work = worker_of(ScoreImages, trained, tmp_path, tiled(trained))
    work.scores.cfg = ScoreConfig(scores=("bald",), bald_passes=2, embedding_dim=0)
    picture = Picture(Source("a", "a.png"), panorama[:, :300], np.ones((320, 300), bool), "")
    first, again = work.rows([picture])[0]["bald"], work.rows([picture])[0]["bald"]
    assert first == again > 0
