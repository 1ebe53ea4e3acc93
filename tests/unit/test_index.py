"""Manifests: a second run adds what is new or changed, every image once, nothing is lost in silence, a killed run leaves no trace."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest

import raysal.archive.index as indexing
from raysal.archive.filters import Filters, Range, kinds
from raysal.archive.index import index, rows_of
from raysal.archive.known import CHANGED, NEW, SAME, UNSEEN, Known
from raysal.archive.tables import manifest_schema, read_table
from raysal.archive.uris import absolute, list_names, open_fs, read_bytes, remove_tree, write_bytes
from raysal.errors import InputError, ResourceError
from raysal.stream.archive import open_manifest
from raysal.stream.manifest import read
from tests.manifests import NAVCAM, fill, record, uris


def names(manifest: str) -> list[str]:
    return [uri.rpartition("/")[2] for uri in uris(manifest)]


@pytest.fixture
def archive(root: str) -> str:
    return fill(f"{root}/archive", "a/1.jpg", "a/2.jpg", "b/3.jpg")


@pytest.fixture
def out(root: str) -> str:
    return f"{root}/manifest"


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_tells_what_the_store_and_the_name_tell(tmp_path: Path) -> None:
    fill(str(tmp_path / "archive"), f"sol/01343/{NAVCAM.format('F')}", "x/ünknown.png")
    os.utime(tmp_path / "archive/x/ünknown.png", (1e9, 1e9))
    index([str(tmp_path / "archive")], str(tmp_path / "m"))
    table = read_table(str(tmp_path / "m"))
    assert table.schema.equals(manifest_schema(), check_metadata=True)
    rover, other = table.to_pylist()
    assert {k: rover[k] for k in ("product", "mission", "camera", "sol", "site", "drive", "sequence", "group", "exclude", "size")} == {
        "product": "NLB_516721703EDR_F0540992CCAM15900M1", "mission": "msl", "camera": "navcam_left", "sol": 1343, "site": 54, "drive": 992,
        "sequence": "CCAM15900", "group": "msl/54/992", "exclude": [], "size": 1,
    }  # fmt: skip
    assert other["uri"] == f"{tmp_path}/archive/x/ünknown.png" and other["group"] == f"{tmp_path}/archive/x"
    assert other["modified"].timestamp() == 1e9 and other["etag"] is None
    assert {other[k] for k in ("product", "mission", "camera", "sol", "site", "drive", "sequence")} == {None}
    assert all(re.fullmatch("[0-9a-f]{32}", row["id"]) for row in (rover, other))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (NAVCAM.format("F"), "msl/54/992"),
        ("0710MR0030170000402526E01_DRLX.JPG", "msl/sol710"),
        ("sol00007/holiday.jpg", "sol7"),
        ("deep/er/holiday.jpg", "ROOT/deep/er"),
        ("holiday.jpg", ""),
    ],
)
def test_a_group_is_what_shows_the_same_ground(tmp_path: Path, name: str, group: str) -> None:
    """The rover's stop, else the sol, else a folder; nothing where all images of an archive lie together."""
    index([fill(str(tmp_path / "a"), name)], str(tmp_path / "m"))
    assert read_table(str(tmp_path / "m"))["group"].to_pylist() == [group.replace("ROOT", f"{tmp_path}/a")]


def test_a_manifest_is_what_scoring_and_labeling_read(archive: str, out: str) -> None:
    index([archive], out)
    table, wanted = read(open_manifest(out))
    assert len(wanted) == 3 and isinstance(table, pa.Table) and table["uri"].to_pylist() == uris(out)
    assert table.equals(read_table(out, ["id", "uri", "exclude"]).replace_schema_metadata())


def test_a_folder_that_is_scored_without_an_index_gives_the_same_rows(archive: str, out: str) -> None:
    """The same ids, so that what was done once counts; and its thumbnails too, as they were asked for by name."""
    index([archive], out)
    assert open_manifest(archive).equals(read_table(out))
    fill(archive, f"a/{NAVCAM.format('T')}")
    assert rows_of(archive).num_rows == 4


# --- second runs ------------------------------------------------------------------------------------------------------


def test_a_second_run_adds_only_what_is_new_or_changed_and_says_how_many(archive: str, out: str) -> None:
    first = index([archive], out)
    assert (first.rows, first.new, first.changed, first.same) == (3, 3, 0, 0)
    before = {row["uri"]: row["id"] for row in read_table(out).to_pylist()}
    files = list_names(out)
    again = index([archive], out)
    assert (again.rows, again.new, again.changed, again.same) == (3, 0, 0, 3)
    assert list_names(out) == files, "nothing new, nothing written"

    fill(archive, "a/2.jpg", "c/4.jpg", data=b"other")
    third = index([archive], out)
    assert (third.rows, third.new, third.changed, third.same) == (4, 1, 1, 2)
    after = {row["uri"]: row["id"] for row in read_table(out).to_pylist()}
    root = absolute(archive)
    assert len(uris(out)) == len(after) == 4
    assert {u for u in after if after[u] != before.get(u)} == {f"{root}/a/2.jpg", f"{root}/c/4.jpg"}
    assert read_table(out).filter(pa.compute.field("uri") == f"{root}/a/2.jpg")["size"].to_pylist() == [5]


def test_a_touched_file_is_a_changed_one(tmp_path: Path) -> None:
    root, out = fill(str(tmp_path / "a"), "1.jpg"), str(tmp_path / "m")
    index([root], out)
    os.utime(f"{root}/1.jpg", (1e9, 1e9))
    assert index([root], out).changed == 1
    assert index([root], out).same == 1


def test_files_that_are_gone_stay_and_are_counted_until_they_are_pruned(archive: str, out: str) -> None:
    index([archive], out)
    remove_tree(f"{archive}/b/3.jpg")
    for _ in range(2):
        kept = index([archive], out)
        assert (kept.rows, kept.gone, kept.pruned) == (3, 1, 0)
    pruned = index([archive], out, prune=True)
    assert (pruned.rows, pruned.gone, pruned.pruned, names(out)) == (2, 1, 1, ["1.jpg", "2.jpg"])
    assert index([archive], out).gone == 0


def test_what_other_runs_listed_is_not_gone(archive: str, out: str, root: str) -> None:
    """One sol at a time, a list, a folder whose name begins alike."""
    index([archive], out)
    other = fill(f"{root}/archive2", "4.jpg")
    write_bytes(f"{root}/list.txt", b"archive2/5.jpg\n")
    for place, rows in ((f"{archive}/a", 3), (other, 4), (f"{root}/list.txt", 5)):
        summary = index([place], out, prune=True)
        assert (summary.gone, summary.rows) == (0, rows)


def test_filters_decide_what_is_added_not_what_stays(archive: str, out: str) -> None:
    fill(archive, f"a/{NAVCAM.format('T')}")
    index([archive], out, Filters(kinds=kinds(["thumbnails"], [])))
    summary = index([archive], out, prune=True)
    assert (summary.rows, summary.gone, summary.left_out) == (4, 0, {"thumbnail": 1})


def test_a_shard_of_which_nothing_is_left_is_removed(archive: str, out: str) -> None:
    index([f"{archive}/a"], out)
    index([f"{archive}/b"], out)
    assert [n for n in list_names(out) if n.endswith(".parquet")] == ["part-0000-00000.parquet", "part-0001-00000.parquet"]
    remove_tree(f"{archive}/b/3.jpg")
    index([archive], out, prune=True)
    assert [n for n in list_names(out) if n.endswith(".parquet")] == ["part-0000-00000.parquet"]
    assert record(out)["shards"] == {"part-0000-00000.parquet": 2}


def test_the_record_tells_what_the_manifest_holds(archive: str, out: str) -> None:
    index([archive], out, Filters(size_bytes=Range(0, 99)))
    found = record(out)
    assert found["shards"] == {"part-0000-00000.parquet": 3} and found["places"] == [absolute(archive)]
    assert found["counts"]["new"] == found["counts"]["rows"] == 3 and found["filters"]["size_bytes"] == {"low": 0, "high": 99}


# --- every image once, and everything counted ---------------------------------------------------------------------------


def test_duplicates_are_one_row_and_counted(tmp_path: Path) -> None:
    """The same file twice in a list, by several spellings, and in overlapping places."""
    root = fill(str(tmp_path / "a"), "x/1.jpg", "x/2.jpg")
    (tmp_path / "l.txt").write_text(f"a/x/1.jpg\na//x/../x/1.jpg\n{root}/x/1.jpg\nfile://{root}/x/2.jpg\n")
    summary = index([str(tmp_path / "l.txt"), root, f"{root}/x/"], str(tmp_path / "m"))
    assert (summary.rows, summary.new, summary.duplicates) == (2, 2, 6)
    assert names(str(tmp_path / "m")) == ["1.jpg", "2.jpg"]


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    root = fill(str(tmp_path / "a"), NAVCAM.format("F"), NAVCAM.format("T"), NAVCAM.format("S"), "calib/flat.png", "notes.txt", "x.lbl")
    fill(root, "NLA_397586928RNG_F0010008AUT_04096M1.png", NAVCAM.format("D"), "1F128285236EDN0000P1001L0M1-BR.JPG")
    fill(root, "big.jpg", data=b"x" * 100)
    summary = index([root], str(tmp_path / "m"), Filters(missions=("msl",), size_bytes=Range(None, 99)))
    assert summary.left_out == {"thumbnail": 1, "subframe": 1, "calibration": 1, "derived": 1, "mission": 2}
    assert (summary.rows, summary.labels, summary.others) == (2, 1, 1)
    everything = index([root], str(tmp_path / "n"), Filters(kinds=kinds(["thumbnail,subframe", "calibration,derived"], [])))
    assert (everything.rows, everything.left_out) == (8, {})
    assert index([root], str(tmp_path / "o"), Filters(size_bytes=Range(None, 99))).left_out["size"] == 1


def test_a_list_with_garbage_is_indexed_without_it(tmp_path: Path) -> None:
    lines = [f"s3://bucket/{i}.jpg".encode() if i % 10 else b"\xff\x00garbage" for i in range(1000)]
    (tmp_path / "l.csv").write_bytes(b"\n".join(lines))
    summary = index([str(tmp_path / "l.csv")], str(tmp_path / "m"))
    assert (summary.rows, summary.unreadable, len(summary.examples)) == (900, 100, 20)


def test_shards_hold_no_more_than_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "SHARD_ROWS", 20)
    (tmp_path / "l.txt").write_text("".join(f"s3://b/{i:03d}.jpg\n" for i in range(50)))
    index([str(tmp_path / "l.txt")], str(tmp_path / "m"))
    assert list(record(str(tmp_path / "m"))["shards"].values()) == [20, 20, 10]
    assert uris(str(tmp_path / "m")) == [f"s3://b/{i:03d}.jpg" for i in range(50)], "in the order of the listing"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_archive_without_images_is_an_error_that_leaves_nothing(root: str, out: str) -> None:
    fill(f"{root}/archive", "notes.txt", "x.lbl", NAVCAM.format("T"))
    with pytest.raises(InputError, match=r"archive: no image to index \(1 left out: thumbnail, 1 labels, 1 other files\)"):
        index([f"{root}/archive"], out)
    fs, path = open_fs(out)
    assert not fs.exists(path)
    index([f"{root}/archive"], out, Filters(kinds=kinds(["thumbnail"], [])))


def test_an_archive_that_lost_its_images_keeps_its_manifest(archive: str, out: str) -> None:
    """A disk that is not mounted looks like that."""
    index([archive], out)
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        remove_tree(f"{archive}/{name}")
    fill(archive, "notes.txt")
    summary = index([archive], out)
    assert (summary.rows, summary.gone) == (3, 3) and len(uris(out)) == 3


@pytest.mark.parametrize(
    "files", [{"labels.parquet": b"PAR1"}, {"_SUCCESS": b"{}", "part-0123.parquet": b""}, {"config.yaml": b"", "x.tmp": b"", "_new-x": b""}]
)
def test_the_folder_of_something_else_is_refused(archive: str, out: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        write_bytes(f"{out}/{name}", data)
    with pytest.raises(InputError, match="so it is no manifest; name an empty or new folder"):
        index([archive], out)
    assert {n: read_bytes(f"{out}/{n}") for n in list_names(out)} == files, "nothing added, nothing taken away"


def test_a_manifest_that_is_not_whole_is_refused(archive: str, out: str) -> None:
    index([archive], out)
    shard = read_bytes(f"{out}/part-0000-00000.parquet")
    write_bytes(f"{out}/stranger.parquet", shard)
    with pytest.raises(InputError, match=r"stranger.parquet was not written by raysal index"):
        index([archive], out)
    remove_tree(f"{out}/stranger.parquet")
    remove_tree(f"{out}/part-0000-00000.parquet")
    with pytest.raises(InputError, match=r"part-0000-00000.parquet is missing"):
        index([archive], out)
    write_bytes(f"{out}/part-0000-00000.parquet", shard[:50])
    with pytest.raises(InputError, match=r"part-0000-00000.parquet is damaged"):
        index([archive], out)
    write_bytes(f"{out}/_INDEX.json", b'{"version": 2, "shards": {}}')
    with pytest.raises(InputError, match=r"version 2.*upgrade"):
        index([archive], out)
    write_bytes(f"{out}/_INDEX.json", b"{")
    with pytest.raises(InputError, match="damaged"):
        index([archive], out)


def test_a_file_is_no_folder_for_a_manifest(tmp_path: Path) -> None:
    fill(str(tmp_path), "a/1.jpg", "m")
    with pytest.raises(InputError, match="m: "):
        index([str(tmp_path / "a")], str(tmp_path / "m"))
    assert (tmp_path / "m").read_bytes() == b"x"


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    root, out = fill(str(tmp_path / "a"), "1.jpg"), str(tmp_path / "m")
    with indexing.locked(out, "busy"), pytest.raises(InputError, match="another process is at work on this manifest"):
        index([root], out)
    assert index([root], out).rows == 1


@pytest.mark.parametrize("second_run", [False, True])
def test_a_full_disk_is_said_and_leaves_the_manifest_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second_run: bool) -> None:
    root, out = fill(str(tmp_path / "a"), "1.jpg"), str(tmp_path / "m")
    if second_run:
        index([root], out)
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} if second_run else {}
    fill(root, "2.jpg")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InputError, match=r"no space left for .* bytes; free some and run the same command again"):
            index([root], out)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} if second_run else not (tmp_path / "m").exists()
    assert before == ({p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} if second_run else {})
    assert index([root], out).rows == 2


def test_full_temporary_files_are_said() -> None:
    with pytest.raises(ResourceError, match=r"no space left for temporary files.*TMPDIR"), Known() as known:
        known._db.execute("PRAGMA max_page_count=4")
        known.add((f"/{i}.jpg", f"{i:032x}") for i in range(10_000))


def test_what_is_known_of_a_file_follows_its_content() -> None:
    with Known() as known:
        known.add([("/a", "0" * 32), ("/b", "1" * 32), ("/c", "2" * 32), ("/d", "3" * 32)])
        assert [known.meet("/a", "0" * 32), known.meet("/b", "f" * 32), known.meet("/e", "4" * 32)] == [SAME, CHANGED, NEW]
        assert [known.meet(uri, "0" * 32) for uri in ("/a", "/b", "/e")] == [None, None, None]
        known.keep("/c")
        assert [known.state(uri) for uri in ("/a", "/b", "/c", "/d", "/e", "/f")] == [SAME, CHANGED, SAME, UNSEEN, NEW, None]
