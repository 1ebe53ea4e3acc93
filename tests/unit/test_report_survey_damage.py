"""The report on scores and labels: honest on half a folder, harmless whatever it holds, light whatever its size."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysal.archive.tables import labels_schema, read_table, scores_schema, write_table
from raysal.errors import InputError
from raysal.images.masks import encode_mask
from raysal.labels import S5MARS, LabelSet
from raysal.report import build
from raysal.report.places import Places, from_manifest
from raysal.report.survey import Survey, survey
from raysal.stream.output import FAILED, SUCCESS, TRUST, Output
from raysal.stream.worker import RUN
from tests import output_folder
from tests.output_folder import FAILURES, MODEL, START
from tests.pages import EVIL, Page, survey_html, survey_text

# --- half a folder, and damaged files ---------------------------------------------------------------------------------


def test_an_unfinished_folder_says_so_and_shows_what_is_there(tmp_path: Path, quick: None) -> None:
    folder = output_folder.labels(tmp_path / "labels", images=4, finished=False)
    build(str(folder))
    text = survey_text(folder)
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
    said = re.findall(r'<div class="gone">([^<]*)</div>', survey_html(folder))
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
    text = survey_text(folder)
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
    assert "Coverage against precision" in survey_text(folder)


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
