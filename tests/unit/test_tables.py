"""Tables: their columns are the interface, and reading finds what is wrong before anyone computes with it."""

from __future__ import annotations

import datetime
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysal.archive import tables
from raysal.archive.uris import read_bytes, write_bytes
from raysal.errors import DataError, InputError
from raysal.labels import S5MARS

SCORES = ("entropy", "uncertainty")


@dataclass(frozen=True)
class Thing:
    id: str
    image: str
    exclude: tuple[str, ...] = ()
    group: str = ""


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh folder, on disk and in an object-like store."""
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def manifest(*ids: str) -> pa.Table:
    return tables.manifest_of([Thing(i, f"/archive/{i}.jpg") for i in ids])


def test_columns_are_those_of_the_interface() -> None:
    assert tables.manifest_schema().names == [
        "id", "uri", "size", "etag", "modified", "product", "mission", "camera", "sol", "site", "drive", "sequence", "exclude", "group",
    ]  # fmt: skip
    assert tables.scores_schema(SCORES, 4).names == [
        "id", "uri", "status", "error", "width", "height", "entropy", "uncertainty", "class_fractions", "embedding",
        "model_digest", "scored_at",
    ]  # fmt: skip
    assert tables.queue_schema().names == ["rank", "id", "uri", "strategy", "score", "reasons", "round", "prelabel"]
    assert tables.labels_schema().names == [
        "id", "uri", "status", "error", "width", "height", "mask_png", "confidence", "abstained", "class_fractions",
        "source_sha256", "model_digest", "config_digest", "raysal_version", "labeled_at",
    ]  # fmt: skip


def test_every_schema_names_its_table_and_version() -> None:
    schemas = (tables.manifest_schema(), tables.scores_schema(SCORES), tables.queue_schema(), tables.labels_schema())
    assert [s.metadata[b"raysal_table"] for s in schemas] == [b"manifest", b"scores", b"queue", b"labels"]
    assert {s.metadata[b"version"] for s in schemas} == {b"1"}


def test_no_embedding_means_no_column() -> None:
    assert "embedding" not in tables.scores_schema(SCORES, 0).names


@pytest.mark.parametrize("names", [("entropy", "entropy"), ("entropy", "width")])
def test_a_score_never_takes_the_name_of_another_column(names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"entropy|width"):
        tables.scores_schema(names)


def test_a_manifest_of_items_keeps_their_order_groups_and_exclude_masks() -> None:
    table = tables.manifest_of([Thing("b", "/b.jpg", ("/b_rover.png", "/b_far.png"), "058/0000"), Thing("a", "/a.jpg")])
    assert table.schema.equals(tables.manifest_schema(), check_metadata=True)
    rows = table.select(["id", "uri", "exclude", "group", "sol"]).to_pylist()
    assert rows == [
        {"id": "b", "uri": "/b.jpg", "exclude": ["/b_rover.png", "/b_far.png"], "group": "058/0000", "sol": None},
        {"id": "a", "uri": "/a.jpg", "exclude": [], "group": "", "sol": None},
    ]
    assert tables.manifest_of([]).schema.equals(tables.manifest_schema())


def test_a_table_comes_back_as_it_was_written(folder: str) -> None:
    table = manifest("b", "a")
    tables.write_table(f"{folder}/manifest.parquet", table)
    read = tables.read_table(f"{folder}/manifest.parquet")
    assert read.equals(table) and read.schema.equals(table.schema, check_metadata=True)


def test_every_kind_of_row_survives_parquet(folder: str) -> None:
    """Failed images are rows too: null scores and null embeddings come back as nulls."""
    now = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.timezone.utc)
    good = {
        "id": "a", "uri": "/a", "status": "ok", "error": None, "width": 3, "height": 2, "entropy": 0.25, "uncertainty": 1e-9,
        "class_fractions": [0.5, 0.5], "embedding": [np.float16(v) for v in (0.5, -0.25)], "model_digest": "f00", "scored_at": now,
    }  # fmt: skip
    bad = dict.fromkeys(good) | {"id": "b", "uri": "/b", "status": "decode", "error": "/b: the file is empty"}
    tables.write_table(f"{folder}/s.parquet", pa.Table.from_pylist([good, bad, good], schema=tables.scores_schema(SCORES, 2)))
    assert tables.read_table(f"{folder}/s.parquet").to_pylist() == [good, bad, good]

    chosen = {
        "rank": 0,
        "id": "a",
        "uri": "/a",
        "strategy": "ueq",
        "score": 0.5,
        "reasons": [("entropy", 0.25)],
        "round": 1,
        "prelabel": None,
    }
    tables.write_table(f"{folder}/q.parquet", pa.Table.from_pylist([chosen], schema=tables.queue_schema()))
    assert tables.read_table(f"{folder}/q.parquet").to_pylist() == [chosen]

    mask = dict.fromkeys(tables.labels_schema().names) | {"id": "a", "uri": "/a", "status": "ok", "mask_png": b"\x89PNG", "labeled_at": now}
    tables.write_table(f"{folder}/l.parquet", pa.Table.from_pylist([mask], schema=tables.labels_schema()))
    assert tables.read_table(f"{folder}/l.parquet").to_pylist() == [mask]


def test_a_folder_is_read_in_path_order_without_its_markers(folder: str) -> None:
    for name, ids in (("b.parquet", "cd"), ("a.parquet", "ab"), ("sub/c.parquet", "e")):
        tables.write_table(f"{folder}/{name}", manifest(*ids))
    for marker in ("_SUCCESS", "_tmp/x.parquet", ".hidden.parquet", "notes.txt"):
        write_bytes(f"{folder}/{marker}", b"not parquet")
    for uri in (folder, f"{folder}/"):
        assert tables.read_table(uri, ["id"]).column("id").to_pylist() == list("abcde")


def test_columns_come_in_the_order_asked(folder: str) -> None:
    tables.write_table(f"{folder}/m.parquet", manifest("a"))
    assert tables.read_table(folder, ["uri", "id"]).column_names == ["uri", "id"]


def test_shards_whose_column_is_all_null_join_the_others(folder: str) -> None:
    tables.write_table(f"{folder}/0.parquet", pa.table({"id": ["a"], "error": pa.nulls(1)}))
    tables.write_table(f"{folder}/1.parquet", pa.table({"id": ["b"], "error": ["broken"]}))
    assert tables.read_table(folder).column("error").to_pylist() == [None, "broken"]


def test_a_missing_column_is_named_with_those_that_are_there(folder: str) -> None:
    tables.write_table(f"{folder}/m.parquet", manifest("a"))
    with pytest.raises(InputError, match=r"m\.parquet: a manifest table without column entropy; it has id, uri"):
        tables.read_table(f"{folder}/m.parquet", ["id", "entropy"])


@pytest.mark.parametrize(("name", "words"), [("nothing", "does not exist"), ("", "holds no Parquet file")])
def test_nothing_to_read_is_said(folder: str, name: str, words: str) -> None:
    write_bytes(f"{folder}/_SUCCESS", b"{}")
    with pytest.raises(InputError, match=words):
        tables.read_table(f"{folder}/{name}")


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_damaged_shard_is_named(folder: str, keep: int) -> None:
    tables.write_table(f"{folder}/good.parquet", manifest("a"))
    tables.write_table(f"{folder}/whole", manifest("b"))
    write_bytes(f"{folder}/torn.parquet", read_bytes(f"{folder}/whole")[:keep])
    with pytest.raises(InputError, match=r"torn\.parquet: not a whole Parquet file"):
        tables.read_table(folder)


def test_a_newer_version_is_refused(folder: str) -> None:
    newer = manifest("a").replace_schema_metadata({"raysal_table": "manifest", "version": "2"})
    tables.write_table(f"{folder}/m.parquet", newer)
    with pytest.raises(InputError, match="version 2, this raysal reads up to 1; upgrade"):
        tables.read_table(folder)


def test_files_that_disagree_are_refused(folder: str) -> None:
    tables.write_table(f"{folder}/0.parquet", pa.table({"id": ["a"]}))
    tables.write_table(f"{folder}/1.parquet", pa.table({"id": [1]}))
    with pytest.raises(InputError, match="different columns"):
        tables.read_table(folder)


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_scan_gives_what_reading_gives_some_rows_at_a_time(folder: str, rows: int) -> None:
    for name, ids in (("b.parquet", "cd"), ("a.parquet", "abx"), ("sub/c.parquet", "e"), ("empty.parquet", "")):
        tables.write_table(f"{folder}/{name}", manifest(*ids))
    batches = list(tables.scan_table(folder, ["uri", "id"], rows))
    assert pa.Table.from_batches(batches).equals(tables.read_table(folder, ["uri", "id"]))
    assert max(b.num_rows for b in batches) <= rows
    assert {b.schema.metadata[b"raysal_table"] for b in batches} == {b"manifest"}


def test_a_scan_refuses_what_reading_refuses(folder: str) -> None:
    tables.write_table(f"{folder}/good.parquet", manifest("a"))
    with pytest.raises(InputError, match=r"good\.parquet: a manifest table without column score"):
        list(tables.scan_table(folder, ["id"], 5, needed=["score"]))
    write_bytes(f"{folder}/torn.parquet", read_bytes(f"{folder}/good.parquet")[:-5])
    with pytest.raises(InputError, match=r"torn\.parquet: not a whole Parquet file"):
        list(tables.scan_table(folder, ["id"], 5))
    with pytest.raises(InputError, match="does not exist"):
        list(tables.scan_table(f"{folder}/nothing", ["id"], 5))


def test_parquet_of_other_programs_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "x.parquet")
    assert tables.read_table(str(tmp_path)).column("id").to_pylist() == ["a"]


def test_scores_and_labels_carry_their_classes(tmp_path: Path) -> None:
    for name, schema in (("scores", tables.scores_schema(SCORES, 0, S5MARS)), ("labels", tables.labels_schema(S5MARS))):
        tables.write_table(str(tmp_path / f"{name}.parquet"), schema.empty_table())
        read = tables.read_schema(str(tmp_path / f"{name}.parquet"))
        assert read.equals(schema, check_metadata=True) and tables.label_set_in(read) == S5MARS
    assert tables.label_set_in(tables.labels_schema()) is None
    with pytest.raises(InputError, match="does not exist"):
        tables.read_schema(str(tmp_path / "none"))
    with pytest.raises(DataError, match="label set 'table' is not JSON"):
        tables.label_set_in(tables.labels_schema().with_metadata({tables.LABEL_SET: "half {"}))
