"""The report on scores and labels: complete on a finished folder, honest on half of one, harmless whatever it holds, in no run's way."""

from __future__ import annotations

import base64
import json
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raysal.archive.tables import labels_schema, read_table, scan_table, scores_schema, write_table
from raysal.archive.uris import absolute, read_bytes, write_bytes
from raysal.cli import main
from raysal.errors import InputError
from raysal.images.masks import encode_mask
from raysal.labels import S5MARS, LabelSet
from raysal.model.metrics import ClassReliability
from raysal.report import build
from raysal.report.places import Places, class_map, from_manifest
from raysal.report.survey import SHOWN, Survey, survey
from raysal.report.survey_page import looks
from raysal.report.survey_sections import PRECISIONS, curve
from raysal.stream.output import FAILED, SUCCESS, TRUST, Output
from raysal.stream.worker import RUN
from tests import output_folder
from tests.output_folder import FAILURES, MODEL, START
from tests.unit.test_report import EVIL, Page

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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not painted, which takes most of a page's time; other tests look at them."""
    monkeypatch.setattr("raysal.report.charts.png", lambda _: output_folder.png(1))
    monkeypatch.setattr("raysal.report.survey_page.write_tiles", lambda *_: None)


def html_of(folder: Path) -> str:
    return (folder.parent / f"{folder.name}-report" / "index.html").read_text(encoding="utf-8")


def text_of(folder: Path) -> str:
    return " ".join(Page(html_of(folder)).text.split())


# --- a finished folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "charts"), [("labels", LABEL_CHARTS), ("scores", SCORE_CHARTS)])
def test_a_finished_folder_gives_every_figure_and_needs_nothing_but_the_page(
    kind: str, charts: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    html, beside = html_of(folder), folder.parent / f"{kind}-report"
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
    text = text_of(labels)
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
    text = text_of(scores)
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
            best = next(((a, b) for a, b in tails if a and b >= p * a), (0, 0))
            n, n_right = n + best[0], n_right + best[1]
        assert kept == pytest.approx(n / pixels_CN.sum())
        assert np.isnan(right) if n == 0 else right == pytest.approx(n_right / n) and right >= p
    assert (np.diff(found.kept) <= 0).all() and found.kept[0] > found.kept[-1]
    stated = {e["precision"]: e["kept_of_all"] for e in trust["val"]["abstention"]}
    assert {p: found.kept[PRECISIONS.index(p)] for p in stated} == pytest.approx(stated)


def test_the_page_says_that_the_curve_is_vals_and_what_is_in_use(labels: Path, tmp_path: Path, quick: None) -> None:
    text = text_of(labels)
    assert "which are not this archive's, so it says what to expect and proves nothing here" in text
    assert "Only an audit can tell." in text
    assert "In use here: 80 %, which left" in text
    plain = output_folder.labels(tmp_path / "labels", images=2, precision=None)
    build(str(plain))
    assert "No threshold is in use here" in text_of(plain)


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
    output.claim(replace=False)
    output.open()
    output.commit({"counts": {"ok": 8}}, output.held())
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


# --- half a folder, and damaged files ---------------------------------------------------------------------------------


def test_an_unfinished_folder_says_so_and_shows_what_is_there(tmp_path: Path, quick: None) -> None:
    folder = output_folder.labels(tmp_path / "labels", images=4, finished=False)
    build(str(folder))
    text = text_of(folder)
    assert "This folder is not finished It has no _SUCCESS" in text
    assert "shows the 8 rows that are there" in text
    assert "The checkpoint was not measured on val images, or no run has finished yet" in text
    assert "written at the end of a run" in text


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        with pytest.raises(InputError, match=r"no run folder.*no scores or labels.*raysal loop.*raysal score.*raysal label"):
            build(str(tmp_path / name))
    Output(str(tmp_path / "begun"), labels_schema(), {"kind": "LabelImages"}).claim(replace=False)
    with pytest.raises(InputError, match="holds no rows of scores or labels yet"):
        build(str(tmp_path / "begun"))
    write_table(str(tmp_path / "other/table.parquet"), pa.table({"id": ["x"]}))
    with pytest.raises(InputError, match="holds no rows of scores or labels yet"):
        build(str(tmp_path / "other"))
    assert not list(tmp_path.glob("*-report"))


def test_a_manifest_for_a_run_is_refused(partial: Path) -> None:
    with pytest.raises(InputError, match=r"is a run; a manifest belongs to a folder of scores or labels, for example .*run/labels"):
        build(str(partial), "manifest.parquet")


def test_images_and_masks_that_can_not_be_shown_leave_a_sentence(tmp_path: Path, quick: None) -> None:
    folder = output_folder.labels(tmp_path / "labels", images=4)
    found = survey(str(folder))
    gone, larger, *_ = sorted(one.uri for one in found.certain)
    Path(gone).unlink()
    Path(larger).write_bytes(output_folder.png(50))
    build(str(folder))
    said = re.findall(r'<div class="gone">([^<]*)</div>', html_of(folder))
    assert len(said) == 4  # both galleries show all four images
    assert sum("fetch:" in s and "scene_000.png" in s for s in said) == 2
    assert sum("mask is 48 x 48, image 50 x 50" in s for s in said) == 2


@pytest.mark.parametrize("damage", ["missing", "garbage", "[]"])
@pytest.mark.parametrize("name", [RUN, SUCCESS, TRUST, FAILED, "_rows.pq", "shard"])
def test_no_missing_or_damaged_file_costs_the_page(tmp_path: Path, name: str, damage: str, quick: None) -> None:
    folder = output_folder.labels(tmp_path / "labels", images=8)
    path = sorted(folder.glob("part-*"))[0] if name == "shard" else folder / name
    lost = read_table(str(path), ["id"]).num_rows if name == "shard" else 0
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"\x00\xff{garbage" if damage == "garbage" else b"[]")
    build(str(folder))
    text = text_of(folder)
    assert "Where this comes from" in text
    assert f"of {12 - lost} rows" in text
    if name == "shard":
        assert f"_SUCCESS speaks of 12 rows, {12 - lost} could be read" in text
        assert ("1 of 2 files of the table could not be read" in text) == (damage != "missing")
    elif damage == "garbage" and name in (RUN, SUCCESS, TRUST):
        assert f"{name}: " in text and "could not show" in text


def test_tables_without_class_names_take_them_from_the_evaluation_or_carry_numbers(tmp_path: Path) -> None:
    rows = [{"id": "a", "uri": "/a/1.png", "status": "ok", "confidence": 0.5, "abstained": 0.0, "class_fractions": [0.5, 0.5, 0.0]}]
    folder = tmp_path / "labels"
    output_folder.write(folder, labels_schema(), "LabelImages", "labeled_at", rows, finished=True)
    found = survey(str(folder))
    assert (found.label_set.classes, found.named) == (("class 0", "class 1", "class 2"), False)
    (folder / TRUST).write_text(json.dumps({"model_digest": MODEL, "val": {"iou": {"dune": 0.1, "crater": None, "sky": 1}}}))
    found = survey(str(folder))
    assert (found.label_set.classes, found.named) == (("dune", "crater", "sky"), True)


def test_rows_and_statements_of_another_model_are_noticed(tmp_path: Path) -> None:
    folder = output_folder.labels(tmp_path / "labels", images=2)
    trust = json.loads((folder / TRUST).read_text())
    (folder / TRUST).write_text(json.dumps(trust | {"model_digest": "other"}))
    shard = next(folder.glob("part-*"))
    table = read_table(str(shard))
    at = table.schema.get_field_index("model_digest")
    write_table(str(shard), table.set_column(at, "model_digest", pa.array(["stranger"] * len(table))).cast(table.schema))
    found = survey(str(folder))
    assert not found.trust
    assert any("_trust.json is of another model (other)" in note for note in found.notes)
    assert any("rows of another model (stranger)" in note for note in found.notes)


def test_a_shard_of_another_table_is_left_out_and_named(tmp_path: Path) -> None:
    folder = output_folder.labels(tmp_path / "labels", images=2)
    write_table(str(folder / "zz.parquet"), pa.Table.from_pylist([{"id": "s", "uri": "s", "status": "ok"}], schema=scores_schema(("x",))))
    found = survey(str(folder))
    assert found.rows == 2 + FAILURES
    assert "1 of 2 files of the table could not be read to their end" in found.notes[0] and "zz.parquet" in found.notes[0]


# --- hostile files ----------------------------------------------------------------------------------------------------


def test_text_from_tables_is_never_markup(tmp_path: Path, quick: None) -> None:
    evil_classes = LabelSet(EVIL, (EVIL, "b"), ((1, 2, 3), (4, 5, 6)))
    rows = [
        {"id": EVIL, "uri": f"/{EVIL}/{i}{EVIL}", "status": "ok", "confidence": 0.5, "abstained": 0.1, "class_fractions": [0.4, 0.6]}
        | {"mask_png": encode_mask(np.zeros((2, 2), np.uint8)), "width": 2, "height": 2, "raysal_version": EVIL}
        for i in range(2)
    ]
    rows[1]["uri"] = f"/other{EVIL}"
    rows += [{"id": f"x{i}", "uri": EVIL, "status": EVIL, "error": f"{EVIL} {i}"} for i in range(3)]
    folder = tmp_path / f"labels{EVIL.replace('/', '')}"
    schema = labels_schema(evil_classes)
    folder.mkdir()
    for row in rows:
        row |= {"model_digest": EVIL, "labeled_at": datetime(2026, 1, 1, tzinfo=timezone.utc)}
    write_table(str(folder / "part-0.parquet"), pa.Table.from_pylist(rows, schema=schema))
    (folder / RUN).write_text(json.dumps({"kind": EVIL, "model_digest": EVIL}))
    (folder / SUCCESS).write_text(json.dumps({EVIL: EVIL, "config_digest": EVIL, "counts": {EVIL: 5}, "images_per_second": EVIL}))
    (folder / TRUST).write_text(json.dumps({"model_digest": EVIL, "val": {"iou": {EVIL: EVIL}, "abstention": [{"precision": EVIL}]}}))
    html = Path(build(str(folder), out=str(tmp_path / "report"))).read_text()
    assert html.count("&lt;script&gt;") >= 10
    seen = Page(html)
    assert not seen.all("script")
    assert not [a for a in seen.all("img") if a.get("src") == "x"]
    assert not [a for _, a in seen.tags if any(key.startswith("on") for key in a)]
    assert "default-src 'none'" in html


@pytest.mark.parametrize("value", [[], 3, "x", {"precision": "x"}, {"precision": 0.9, "kept_of_all": "x"}, {"precision": 2.5}])
def test_statements_of_any_shape_make_a_page(tmp_path: Path, value: object, quick: None) -> None:
    folder = output_folder.labels(tmp_path / "labels", images=2)
    trust = json.loads((folder / TRUST).read_text())
    audit = {"abstention": [value, value], "images": value, "miou": value, "iou": value, "population": value}
    (folder / TRUST).write_text(json.dumps(trust | {"kept": value, "audit": audit}))
    (folder / SUCCESS).write_text(json.dumps({"counts": value, "seconds": value, "done": value}))
    build(str(folder))
    assert "Coverage against precision" in text_of(folder)


# --- size -------------------------------------------------------------------------------------------------------------


def large(folder: Path, rows: int, per_shard: int) -> Path:
    """Rows without images, in few shards; every hundredth failed."""
    rng, folder_of = np.random.default_rng(0), np.arange(rows) // 50
    status = np.where(np.arange(rows) % 100 == 0, "fetch", "ok")
    ok = status == "ok"
    columns = {
        "id": [f"{i:032x}" for i in range(rows)],
        "uri": [f"s3://bucket/archive/sol_{s:05d}/image_{i:07d}.jpg" for i, s in enumerate(folder_of)],
        "status": status.tolist(),
        "error": [None if o else f"s3://bucket/{i}.jpg: TimeoutError: no answer in {i} s" for i, o in enumerate(ok)],
        "width": [1024] * rows,
        "height": [1024] * rows,
        "mask_png": [b"not a mask " * 10] * rows,
        "confidence": rng.random(rows).astype(np.float32),
        "abstained": np.zeros(rows, np.float32),
        "class_fractions": list(rng.dirichlet(np.ones(9), rows).astype(np.float32)),
        "model_digest": [MODEL] * rows,
        "labeled_at": [START] * rows,
    }
    schema = labels_schema(S5MARS)
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    for i, start in enumerate(range(0, rows, per_shard)):
        write_table(str(folder / f"part-{i:05d}.parquet"), table.slice(start, per_shard))
    return folder


def test_a_hundred_thousand_rows_take_no_more_memory_than_ten_thousand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    add = Survey.add

    def watched(self: Survey, batch: pa.RecordBatch, shard: str, start: int) -> None:
        add(self, batch, shard, start)
        held.append(pa.total_allocated_bytes())

    monkeypatch.setattr(Survey, "add", watched)
    before = pa.total_allocated_bytes()
    most = []
    for rows in (10_000, 100_000):
        folder = large(tmp_path / str(rows), rows, rows // 2)
        held.clear()
        found = survey(str(folder))
        most.append(max(held) - before)
        assert (found.rows, found.ok) == (rows, rows - rows // 100)
        assert [kind.words for kind in found.failed.all] == ["TimeoutError: no answer in … s"]
        assert len(found.groups.sums) == rows // 50
        kept = len(found.certain) + len(found.doubtful) + sum(len(h._counts) for h in found.distributions.values())
        assert kept < 5000
    assert most[1] < most[0] + 8 * 2**20, most


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


def test_a_page_of_a_hundred_thousand_rows_stays_light(tmp_path: Path) -> None:
    page = Path(build(str(large(tmp_path / "labels", 100_000, 50_000))))
    assert page.stat().st_size < 3 * 2**20
    text = " ".join(Page(page.read_text()).text.split())
    assert "Masks of 99,000 images" in text and "1,000in quarantine" in text
    assert "2,000 places in 48 columns" in text


def test_places_of_a_manifest_take_sixteen_bytes_an_image(tmp_path: Path) -> None:
    rows = [{"id": f"{i:032x}", "uri": f"/{i}"} for i in range(2000)]
    found = from_manifest(output_folder.manifest(tmp_path / "m.parquet", rows, sol=[i % 7 for i in range(2000)]))
    assert isinstance(found, Places)
    assert found.ids.nbytes + found.places.nbytes == 16 * 2000
    assert (np.diff(found.ids.astype(object)) > 0).all()
