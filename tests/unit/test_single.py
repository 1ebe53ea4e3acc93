"""The steps of the loop one by one: what they take as images and labels, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysal import config as configs
from raysal.archive.tables import labels_schema, scores_schema, write_table
from raysal.datasets.base import Item
from raysal.errors import DataError, InputError
from raysal.rounds.oracle import LABELS_SCHEMA
from raysal.rounds.single import _named, query_scores
from raysal.stream.archive import open_manifest
from raysal.stream.manifest import read

POOL = tuple(Item(f"{name}.jpg", f"/archive/{name}.jpg") for name in "abcdef")


def rows(*names: str, **more: object) -> list[dict]:
    return [{"id": item.id, "uri": item.image, **more} for item in POOL if item.name.removesuffix(".jpg") in names]


def bought(path: Path, round_: int, *names: str) -> None:
    table = [{"id": i.id, "name": i.name, "uri": i.image, "round": round_} for i in POOL if i.name.removesuffix(".jpg") in names]
    write_table(str(path), pa.Table.from_pylist(table, schema=LABELS_SCHEMA))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that bought labels in two rounds and has chosen those of a third."""
    bought(tmp_path / "run/rounds/000/labels.parquet", 0, "a", "b")
    bought(tmp_path / "run/rounds/001/labels.parquet", 1, "c")
    (tmp_path / "run/rounds/002").mkdir()
    return tmp_path / "run"


def taken(uri: Path) -> list[dict]:
    table, _ = read(open_manifest(str(uri)))
    assert isinstance(table, pa.Table)
    return table.to_pylist()


# --- manifests --------------------------------------------------------------------------------------------------------


def test_scores_and_labels_are_fed_back(tmp_path: Path) -> None:
    """Also from several files; masks, scores and embeddings stay out, and of no image pixels are excluded."""
    schema = scores_schema(("entropy",), 4)
    write_table(str(tmp_path / "scores/part-0.parquet"), pa.Table.from_pylist(rows("a", status="fetch", error="gone"), schema=schema))
    write_table(str(tmp_path / "scores/part-1.parquet"), pa.Table.from_pylist(rows("b", status="ok"), schema=schema))
    (tmp_path / "scores/_SUCCESS").write_text("{}")
    write_table(str(tmp_path / "labels.parquet"), pa.Table.from_pylist(rows("c", mask_png=b"x" * 99), schema=labels_schema()))
    for uri, names in (("scores", "ab"), ("scores/part-0.parquet", "a"), ("labels.parquet", "c")):
        assert taken(tmp_path / uri) == [row | {"exclude": None} for row in rows(*names)]


def test_a_foreign_table_with_id_and_uri_will_do(tmp_path: Path) -> None:
    """Other types of text, columns in another order, and a stranger's columns."""
    uris = pa.array(["/1.jpg", "/2.jpg"], pa.large_string())
    table = pa.table({"stars": [5, 4], "uri": uris, "id": [1, 2], "exclude": [[], ["/no.png"]], "sol": ["Monday", "Tuesday"]})
    pq.write_table(table, tmp_path / "mine.parquet")
    assert taken(tmp_path / "mine.parquet") == [
        {"id": "1", "uri": "/1.jpg", "exclude": []},
        {"id": "2", "uri": "/2.jpg", "exclude": ["/no.png"]},
    ]


@pytest.mark.parametrize("column", ["id", "uri"])
def test_a_table_without_id_or_uri_is_refused(tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({column: ["x"], "other": ["y"]}), tmp_path / "t.parquet")
    missing = {"id": "uri", "uri": "id"}[column]
    with pytest.raises(InputError, match=f"t.parquet.*no column {missing}, it has {column}, other.*needs the columns id and uri"):
        taken(tmp_path / "t.parquet")


def test_rows_that_name_no_image_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1", None], "uri": ["/1.jpg", "/2.jpg"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="1 of its 2 rows lack id or uri"):
        taken(tmp_path / "t.parquet")


def test_a_column_of_another_meaning_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"], "uri": ["/1.jpg"], "exclude": ["Tuesday"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet: can't be read as a manifest .*list"):
        taken(tmp_path / "t.parquet")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_bytes(b"no table")
    with pytest.raises(InputError, match="is neither an image nor a list of URIs"):
        open_manifest(str(tmp_path / "notes.doc"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="not a whole Parquet file"):
        taken(tmp_path / "cut.parquet")


def test_a_damaged_file_among_whole_ones_is_named(tmp_path: Path) -> None:
    for n in range(2):
        pq.write_table(pa.table({"id": [f"{n}"], "uri": [f"/{n}.jpg"]}), tmp_path / f"{n}.parquet")
    (tmp_path / "1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"can't be read as a manifest.*1\.parquet"):
        taken(tmp_path)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_a_run_folder_stands_for_all_that_it_bought(run: Path) -> None:
    assert [i.name for i in _named(POOL, [str(run)])] == ["a.jpg", "b.jpg", "c.jpg"]


def test_labels_from_several_places_are_joined_each_image_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("f\nb.jpg\n")
    sources = [str(run / "rounds/001/labels.parquet"), str(tmp_path / "more.txt"), str(run)]
    assert [i.name for i in _named(POOL, sources)] == ["c.jpg", "f.jpg", "b.jpg", "a.jpg"]


def test_labels_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "young/rounds/000").mkdir(parents=True)
    with pytest.raises(InputError, match="young: this run has bought no labels yet"):
        _named(POOL, [str(tmp_path / "young")])
    (tmp_path / "odd.txt").write_text("a\nzebra\n")
    with pytest.raises(DataError, match=r"odd.txt: 1 names are not in the pool.*zebra"):
        _named(POOL, [str(tmp_path / "odd.txt")])
    with pytest.raises(InputError, match="can't be read"):
        _named(POOL, [str(tmp_path / "none.txt")])
    with pytest.raises(InputError, match="holds no Parquet file"):
        _named(POOL, [str(tmp_path)])


def test_a_query_leaves_out_what_any_of_the_labels_hold(run: Path, tmp_path: Path) -> None:
    table = [row | {"status": "ok", "entropy": 0.1 * k} for k, row in enumerate(rows(*"abcdef"))]
    write_table(str(tmp_path / "scores.parquet"), pa.Table.from_pylist(table, schema=scores_schema(("entropy",))))
    bought(tmp_path / "other.parquet", 0, "f")
    cfg = configs.build({"query": {"strategy": "entropy"}})
    given = [str(run), str(tmp_path / "other.parquet")]
    chosen = query_scores(str(tmp_path / "scores.parquet"), cfg, 2, str(tmp_path / "q.parquet"), given, None)
    assert [row["uri"] for row in chosen] == ["/archive/e.jpg", "/archive/d.jpg"]
    with pytest.raises(DataError, match="3 images are to be chosen, but only 2"):
        query_scores(str(tmp_path / "scores.parquet"), cfg, 3, str(tmp_path / "q.parquet"), given, None)
