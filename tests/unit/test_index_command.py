"""`raysal index`: what it says, what it refuses, where a manifest may lie."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from raysal.archive.index import index
from raysal.archive.tables import read_table, write_table
from raysal.archive.uris import list_names, remove_tree
from raysal.errors import InputError
from tests.helpers import Call
from tests.manifests import NAVCAM, fill, rows_in, uris


def test_the_command_says_what_it_did(tmp_path: Path, raysal: Call) -> None:
    root = fill(str(tmp_path / "a"), "1.jpg", "2.jpg", NAVCAM.format("T"), "x.lbl")
    code, out, err = raysal("index", root, "--out", tmp_path / "m")
    assert code == 0 and "listing the archive" in err
    assert out.splitlines() == [
        f"manifest {tmp_path}/m: 2 images; 2 new, 0 changed, 0 as before",
        "left out: 1 thumbnail (--with thumbnail takes them in)",
        "passed over: 1 labels",
    ]
    code, out, _ = raysal("index", root, "--out", tmp_path / "m", "--with", "thumbnails", "--json")
    found = json.loads(out)
    assert code == 0 and (found["rows"], found["new"], found["same"], found["left_out"]) == (3, 1, 2, {})


def test_filters_of_the_command_are_those_of_the_library(tmp_path: Path, raysal: Call) -> None:
    root = fill(
        str(tmp_path / "a"),
        f"sol/00100/{NAVCAM.format('F')}",
        f"sol/00200/{NAVCAM.format('D')}",
        "0710MR0030170000402526E01_DRLX.JPG",
        "x.jpg",
    )
    for options, wanted in (
        (("--mission", "msl"), 3),
        (("--camera", "navcam"), 2),
        (("--camera", "navcam_left", "--camera", "mastcam"), 3),
        (("--sol", "150-"), 2),
        (("--sol", "100,200"), 2),
        (("--site", "54", "--drive", "900-1000"), 2),
        (("--sequence", "MCAM*"), 1),
        (("--max-size", "1k"), 4),
        (("--without", "tiles"), 4),
    ):
        code, out, err = raysal("index", root, "--out", tmp_path / "-".join(map(str, options)).replace("*", ""), "--json", *options)
        assert code == 0, err
        assert json.loads(out)["rows"] == wanted, options


def test_what_could_not_be_read_is_named_and_makes_the_exit_code_1(tmp_path: Path, raysal: Call) -> None:
    (tmp_path / "l.txt").write_bytes(b"s3://b/1.jpg\nfoo://b/2.jpg\n\xff\n")
    code, out, err = raysal("index", tmp_path / "l.txt", "--out", tmp_path / "m")
    assert code == 1 and "manifest" in out and "not read: 2 folders, files or lines" in out
    said = f"warning: not read: {tmp_path}/l.txt:2: foo://: there is no such kind of store"
    assert "".join(said.split()) in "".join(err.split())  # a terminal wraps lines wherever the path ends
    assert uris(str(tmp_path / "m")) == ["s3://b/1.jpg"]
    assert raysal("index", tmp_path / "l.txt", "--out", tmp_path / "m", "--skip-unreadable")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere", "--out", "m"), "can't be listed"),
        (("EMPTY", "--out", "m"), "no image to index (no files at all)"),
        (("EMPTY", "--out", "m", "--sol", "9-7"), "the range ends before it begins"),
        (("EMPTY", "--out", "m", "--with", "selfies"), "no kind of product"),
        (("EMPTY",), "--out"),
    ],
)
def test_bad_use_ends_with_2_and_leaves_nothing(
    tmp_path: Path, raysal: Call, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, err = raysal("index", *(a.replace("EMPTY", "empty") for a in arguments))
    assert code == 2 and said in err and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_manifest_may_lie_in_a_bucket(tmp_path: Path, s3: str) -> None:
    root, out = fill(f"{s3}/index/archive", "a/1.jpg", "2.jpg"), f"{s3}/index/manifest"
    assert index([root], out).new == 2
    fill(root, "2.jpg", data=b"other")
    remove_tree(f"{root}/a/1.jpg")
    summary = index([root], out, prune=True)
    assert (summary.changed, summary.pruned, summary.rows) == (1, 1, 1)
    assert uris(out) == [f"{root}/2.jpg"] and list_names(out) == ["_INDEX.json", "part-0001-00000.parquet"]
    assert read_table(out)["etag"].null_count == 0


def test_a_manifest_is_a_list_of_its_own(tmp_path: Path) -> None:
    """Sizes and tags go with it, so ids stay; of local files the disk is asked anyway."""
    rows = [{"uri": f"s3://b/{i}.jpg", "size": i, "etag": str(i)} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    index([str(tmp_path / "l.parquet")], str(tmp_path / "m"))
    index([str(tmp_path / "m" / "part-0000-00000.parquet")], str(tmp_path / "n"))
    assert rows_in(tmp_path / "m") == rows_in(tmp_path / "n")


def test_a_run_folder_is_left_alone(tmp_path: Path) -> None:
    write_table(str(tmp_path / "run" / "manifest.parquet"), pa.table({"id": ["a"], "uri": ["/a"]}))
    with pytest.raises(InputError, match="no manifest"):
        index([fill(str(tmp_path / "a"), "1.jpg")], str(tmp_path / "run"))
