"""The report on scores and labels: complete on a finished folder, and in no run's way."""

from __future__ import annotations

import base64
import json
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raysal.archive.tables import labels_schema, read_table, scan_table, write_table
from raysal.archive.uris import absolute, read_bytes, write_bytes
from raysal.cli import main
from raysal.errors import InputError
from raysal.labels import S5MARS
from raysal.model.metrics import SUPPORT, ClassReliability
from raysal.report import build
from raysal.report.places import class_map, from_manifest
from raysal.report.survey import SHOWN, survey
from raysal.report.survey_page import looks
from raysal.report.survey_sections import PRECISIONS, curve
from raysal.stream.output import TRUST, Output
from raysal.stream.worker import RUN
from tests import output_folder
from tests.output_folder import MODEL, START
from tests.pages import Page, survey_html, survey_text

LABEL_CHARTS = (
    "distribution_confidence", "distribution_abstained", "class_shares", "class_map", "coverage", "confusion", "reliability",
)  # fmt: skip
SCORE_CHARTS = ("distribution_uncertainty", "distribution_entropy", "class_shares", "class_map")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder of labels with thresholds in use, and its report."""
    folder = output_folder.labels(tmp_path_factory.mktemp("labels") / "labels", precision=0.8)
    assert build(str(folder)) == str(folder.parent / "labels-report" / "index.html")
    return folder


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = output_folder.scores(tmp_path_factory.mktemp("scores") / "scores")
    build(str(folder))
    return folder


# --- a finished folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "charts"), [("labels", LABEL_CHARTS), ("scores", SCORE_CHARTS)])
def test_a_finished_folder_gives_every_figure_and_needs_nothing_but_the_page(
    kind: str, charts: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    html, beside = survey_html(folder), folder.parent / f"{kind}-report"
    for name in (*charts, "least_certain", "most_certain"):
        with Image.open(beside / f"{name}.png") as picture:
            assert min(picture.size) > 300, name
    seen = Page(html)
    assert len(seen.all("figcaption")) == len(charts) == len(seen.all("source"))
    for name in charts:
        assert base64.b64encode((beside / f"{name}.png").read_bytes()).decode() in html, name
    assert all(a.get("alt") for a in seen.all("img"))
    assert all(a.get("aria-label") for _, a in seen.tags if a.get("class") == "bar")
    assert not [tag for tag, _ in seen.tags if tag in ("script", "iframe", "object", "embed", "base", "form")]
    links = [a[key] for _, a in seen.tags for key in ("src", "srcset", "href", "action", "poster", "data") if a.get(key)]
    assert links and all(str(link).startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\((?!\s*data:)|@import", html)
    assert "could not show" not in html and "not finished" not in html


def test_the_first_screen_says_how_many_of_what_by_which_model_when_and_how_fast(labels: Path) -> None:
    text = survey_text(labels)
    assert "Masks of 16 images" in text and "4 more could not be used" in text
    assert "16 ok, 2 fetch, 1 decode, 1 limit" in text
    assert f"model {MODEL[:12]}" in text and "2026-03-01" in text
    assert "1.6images per second20 in the last run, 12 s" in text
    assert MODEL in text and "labelled by raysal0.1.0" in text


def test_all_of_it_is_counted_once(labels: Path) -> None:
    found, rows = survey(str(labels)), read_table(str(labels)).to_pylist()
    ok = [row for row in rows if row["status"] == "ok"]
    assert (found.rows, found.ok, found.failed.counts()) == (20, 16, {"fetch": 2, "decode": 1, "limit": 1})
    assert found.distributions["confidence"].mean == pytest.approx(np.mean([row["confidence"] for row in ok]))
    assert found.shares.mean == pytest.approx(np.mean([row["class_fractions"] for row in ok], axis=0))
    open_pixels = np.mean([row["abstained"] for row in ok])
    assert found.kept / found.pixels == pytest.approx(1 - open_pixels)
    assert (found.kind, found.label_set, found.digests, found.notes) == ("labels", S5MARS, [MODEL], [])
    assert (found.first, found.last) == (START, max(row["labeled_at"] for row in rows))


def test_the_certain_and_the_doubtful_are_those_of_a_sort_and_open_pixels_count_as_doubt(labels: Path) -> None:
    found = survey(str(labels))
    ok = [row for row in read_table(str(labels)).to_pylist() if row["status"] == "ok"]
    order = [row["id"] for row in sorted(ok, key=lambda row: row["confidence"] * (1 - row["abstained"]))]
    assert [one.id for one in found.doubtful] == order[:SHOWN]
    assert [one.id for one in found.certain] == order[::-1][:SHOWN]
    by_hand = {row["id"]: row for row in ok}
    for one in (*found.certain, *found.doubtful):
        row = by_hand[one.id]
        assert one.uri == row["uri"] and one.size == (48, 48)
        assert one.fractions == pytest.approx(row["class_fractions"])
        assert one.numbers == pytest.approx({name: row[name] for name in ("confidence", "abstained")})


def test_without_thresholds_only_the_mean_confidence_ranks_masks(tmp_path: Path) -> None:
    """Open pixels are then those that were never valid, and say nothing of the model."""
    rows = [
        {"id": name, "uri": name, "status": "ok", "width": 4, "height": 4, "confidence": sure, "abstained": open_}
        for name, sure, open_ in (("a", 0.9, 0.8), ("b", 0.8, 0.0), ("c", None, 1.0))
    ]
    output_folder.write(tmp_path / "labels", labels_schema(S5MARS), "LabelImages", "labeled_at", rows, finished=True)
    found = survey(str(tmp_path / "labels"))
    assert [one.id for one in found.certain] == ["a", "b"]
    assert found.blank == 1


def test_each_gallery_picture_is_the_image_and_its_own_mask(labels: Path) -> None:
    found = survey(str(labels))
    for look in looks(found, found.doubtful):
        with Image.open(look.of.uri) as image:
            assert np.array_equal(look.photo, np.asarray(image))
        assert look.tinted is not None and look.tinted.shape == (48, 48, 3)
        open_rows = int(48 * int(look.name[6:9]) / 32)
        grey = (look.tinted == look.tinted[..., :1]).all(axis=(1, 2))
        assert grey[:open_rows].all() and not grey[open_rows:].all()


def test_scores_are_ranked_by_entropy_and_say_how_many_there_are(scores: Path) -> None:
    found = survey(str(scores))
    rows = [row for row in read_table(str(scores)).to_pylist() if row["status"] == "ok"]
    assert [one.id for one in found.doubtful] == [r["id"] for r in sorted(rows, key=lambda row: -row["entropy"])]
    text = survey_text(scores)
    assert "Scores of 12 images" in text and "2 scores of each image" in text
    assert "Scores hold no masks" in text
    assert all(look.tinted is None and not isinstance(look.photo, str) for look in looks(found, found.doubtful))


# --- coverage against precision ---------------------------------------------------------------------------------------


def test_the_curve_is_what_thresholds_keep_on_val(labels: Path) -> None:
    trust = json.loads((labels / TRUST).read_text())
    found = curve(trust)
    assert found is not None
    pixels_CN, right_CN = np.array(trust["val"]["reliability"])
    for p, kept, right in zip(PRECISIONS, found.kept, found.right, strict=True):
        n = n_right = 0
        for pixels_N, right_N in zip(pixels_CN, right_CN, strict=True):
            tails = [(pixels_N[i:].sum(), right_N[i:].sum()) for i in range(len(pixels_N))]
            best = next(((a, b) for a, b in tails if a >= SUPPORT and b >= p * a), (0, 0))
            n, n_right = n + best[0], n_right + best[1]
        assert kept == pytest.approx(n / pixels_CN.sum())
        assert np.isnan(right) if n == 0 else right == pytest.approx(n_right / n) and right >= p
    assert (np.diff(found.kept) <= 0).all() and found.kept[0] > found.kept[-1]
    stated = {e["precision"]: e["kept_of_all"] for e in trust["val"]["abstention"]}
    assert {p: found.kept[PRECISIONS.index(p)] for p in stated} == pytest.approx(stated)


def test_the_page_says_that_the_curve_is_vals_and_what_is_in_use(labels: Path, tmp_path: Path, quick: None) -> None:
    text = survey_text(labels)
    assert "which are not this archive's, so it says what to expect and proves nothing here" in text
    assert "Only an audit can tell." in text
    assert "In use here: 80 %, which left" in text
    plain = output_folder.labels(tmp_path / "labels", images=2, precision=None)
    build(str(plain))
    assert "No threshold is in use here" in survey_text(plain)


@pytest.mark.parametrize("counts", [[], 7, [[1]], [[[1, 2]], [[3, 0]]], [[[1]], [[-1]]], "text", [[["a"]], [["b"]]]])
def test_counts_of_any_shape_make_a_page(tmp_path: Path, counts: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        curve({"val": {"reliability": counts}})


def test_without_counts_there_is_no_curve() -> None:
    assert curve({}) is None and curve({"val": None}) is None
    one = ClassReliability(2)
    assert (curve({"val": {"reliability": one.counts.tolist()}}).kept == 0).all()  # type: ignore[union-attr]


# --- places -----------------------------------------------------------------------------------------------------------


def test_without_a_manifest_places_are_folders(labels: Path) -> None:
    found = class_map(survey(str(labels)).groups)
    assert found is not None
    assert found.kind == "folder" and found.unknown == 0
    assert found.labels == tuple(f"sol_{10 * i:04d}" for i in range(8))
    assert found.counts.tolist() == [2] * 8


COLUMNS: dict[str, tuple[dict[str, list], tuple[str, ...]]] = {
    "sol": ({"sol": [100 * (i // 4) for i in range(20)], "site": [1] * 20, "drive": [1] * 20}, ("0", "100", "200", "300")),
    "site and drive": ({"site": [3 + i // 8 for i in range(20)], "drive": [12] * 20, "group": ["x"] * 20}, ("3/12", "4/12")),
    "group": ({"group": ["west" if i % 2 else "east" for i in range(20)]}, ("east", "west")),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_manifest_tells_places_by_sol_else_site_and_drive_else_group(labels: Path, tmp_path: Path, kind: str) -> None:
    rows = sorted(read_table(str(labels)).to_pylist(), key=lambda row: row["id"])
    columns, names = COLUMNS[kind]
    uri = output_folder.manifest(tmp_path / "manifest.parquet", rows, **columns)
    groups = survey(str(labels), from_manifest(uri)).groups
    found = class_map(groups)
    assert found is not None
    assert (found.kind, found.labels, found.counts.sum(), found.unknown) == (kind, names, 16, 0)
    first = [
        row["class_fractions"] for i, row in enumerate(rows[:16]) if row["status"] == "ok" and _place(columns, i) == _place(columns, 0)
    ]
    assert found.shares[0] == pytest.approx(np.mean(first, axis=0))


def _place(columns: dict[str, list], i: int) -> tuple:
    return tuple(values[i] for name, values in columns.items() if name != "group" or len(columns) == 1)


def test_images_that_a_manifest_does_not_know_are_counted_and_said(labels: Path, tmp_path: Path, quick: None) -> None:
    rows = sorted(read_table(str(labels)).to_pylist(), key=lambda row: row["id"])[:10]
    uri = output_folder.manifest(tmp_path / "manifest.parquet", rows, sol=[None, None, *range(8)])
    build(str(labels), uri, str(tmp_path / "report"))
    text = " ".join(Page((tmp_path / "report/index.html").read_text()).text.split())
    assert "Classes by sol" in text
    assert "8 images are left out, as the manifest does not tell their sol" in text


def test_a_manifest_that_tells_no_place_leaves_folders_and_a_note(labels: Path, tmp_path: Path, quick: None) -> None:
    rows = read_table(str(labels)).to_pylist()
    uri = output_folder.manifest(tmp_path / "manifest.parquet", rows, group=[""] * 20)
    html = Path(build(str(labels), uri, str(tmp_path / "report"))).read_text()
    assert "tells no sol, site, drive or group of any image; the class map goes by folder" in html
    assert "Classes by folder" in html


def test_a_manifest_that_can_not_be_used_is_refused_before_anything_is_written(labels: Path, tmp_path: Path) -> None:
    write_table(str(tmp_path / "other.parquet"), pa.table({"name": ["x"], "sol": [1]}))
    with pytest.raises(InputError, match="has no column id"):
        build(str(labels), str(tmp_path / "other.parquet"), str(tmp_path / "report"))
    with pytest.raises(InputError, match="does not exist"):
        build(str(labels), str(tmp_path / "none.parquet"), str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


# --- runs go on -------------------------------------------------------------------------------------------------------


def test_a_report_leaves_the_folder_to_the_runs(tmp_path: Path, quick: None) -> None:
    folder = output_folder.labels(tmp_path / "labels", images=4)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    build(str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    output = Output(str(folder), labels_schema(S5MARS), {k: v for k, v in json.loads((folder / RUN).read_text()).items() if k != "token"})
    token = output.claim(replace=False)
    output.open()
    output.commit({"counts": {"ok": 8}}, output.held(), token)
    assert {path.name for path in folder.iterdir()} == set(before)
    build(str(folder))
    assert (tmp_path / "labels-report/index.html").exists()
    output.claim(replace=False)


def test_a_report_can_be_written_elsewhere_and_from_the_command_line(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["raysal", "report", f"{labels}/", "--out", str(tmp_path / "here"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "here/index.html")}
    assert (tmp_path / "here/coverage.png").exists()


def test_a_folder_in_a_store_gives_the_same_page_there(labels: Path, quick: None) -> None:
    place = f"memory://{uuid.uuid4().hex}/labels"
    for path in labels.iterdir():
        write_bytes(f"{place}/{path.name}", path.read_bytes())
    here, there = survey(str(labels)), survey(place)
    for name in ("ok", "pixels", "kept", "label_set", "trust", "success", "first", "last", "notes"):
        assert getattr(there, name) == getattr(here, name), name
    assert [one.uri for one in there.doubtful] == [one.uri for one in here.doubtful]
    assert there.failed.all == here.failed.all
    done: list[tuple[int, int]] = []
    assert build(f"{place}/", on_progress=lambda *counts: done.append(counts)) == f"{absolute(place)}-report/index.html"
    assert done == [(i + 1, 4) for i in range(4)]
    assert b"scene_015.png under its mask" in read_bytes(f"{place}-report/index.html")


def test_no_mask_is_read_but_those_that_are_shown(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def watched(uri: str, columns: Sequence[str], *more: Any) -> Iterator[pa.RecordBatch]:
        asked.extend(columns)
        return scan_table(uri, columns, *more)

    monkeypatch.setattr("raysal.report.survey.scan_table", watched)
    found = survey(str(labels))
    assert "uri" in asked and "mask_png" not in asked
    monkeypatch.setattr("raysal.report.survey_page.scan_table", watched)
    looks(found, found.certain)
    assert asked.count("mask_png") == len(found.certain)
