"""Lists of URIs: taken as they are, garbage noted, every file under one spelling."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysal.archive.entries import Entry
from raysal.archive.index import index
from raysal.archive.uris import canonical, write_bytes
from raysal.errors import InputError
from tests.manifests import listed


def text_list(folder: str, lines: list[str]) -> str:
    write_bytes(f"{folder}/list.txt", "\ufeff".encode() + "\r\n".join(["# of Tuesday", "", *lines]).encode())
    return f"{folder}/list.txt"


def csv_list(folder: str, lines: list[str]) -> str:
    write_bytes(f"{folder}/list.csv", "".join(["sol,URI\n", *(f'7,"{line}"\n' for line in lines)]).encode())
    return f"{folder}/list.csv"


def plain_csv_list(folder: str, lines: list[str]) -> str:
    write_bytes(f"{folder}/plain.csv", "\n".join(lines).encode())
    return f"{folder}/plain.csv"


def parquet_list(folder: str, lines: list[str]) -> str:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"other": range(len(lines)), "uri": pa.array(lines, pa.large_string())}), sink)
    write_bytes(f"{folder}/list.parquet", sink.getvalue().to_pybytes())
    return f"{folder}/list.parquet"


LISTS = [text_list, csv_list, plain_csv_list, parquet_list]


@pytest.mark.parametrize("write", LISTS)
def test_entries_of_a_list_are_taken_as_they_are(root: str, write: Callable[[str, list[str]], str]) -> None:
    """Relative ones start from the list's folder; nothing has to be an image by its suffix, or be there."""
    lines = [
        "a/1.jpg",
        "./b c/ü.png",
        "s3://bucket/x/../y.img",
        "s3a://bucket/z.jpg",
        "https://host/get?id=5",
        "/abs//p/../q.jpg",
        "no_suffix",
    ]
    entries, tally = listed(write(root, lines))
    home = canonical(root)
    assert [e.uri for e in entries] == [
        f"{home}/a/1.jpg",
        f"{home}/b c/ü.png" if root.startswith("/") else f"{home}/./b c/ü.png",
        "s3://bucket/x/../y.img",
        "s3://bucket/z.jpg",
        "https://host/get?id=5",
        "/abs/q.jpg",
        f"{home}/no_suffix",
    ]
    assert (tally.files, tally.unreadable) == (7, 0)
    assert tally.missing == (4 if root.startswith("/") else 1)


def test_of_files_on_disk_a_list_knows_size_and_time(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a.jpg")
    os.utime(tmp_path / "a.jpg", (1e9, 1e9))
    entries, tally = listed(text_list(str(tmp_path), ["a.jpg"]))
    assert entries == [Entry(f"{tmp_path}/a.jpg", 5, None, datetime.fromtimestamp(1e9, timezone.utc))]
    assert entries == listed(str(tmp_path))[0], "a list and a folder tell the same of a file"
    assert tally.missing == 0


def test_a_list_may_tell_size_tag_and_time(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("uri,size,etag,modified\ns3://b/1.jpg,0,abc,2021-02-18T20:55:00Z\ns3://b/2.jpg,many,,soon\n")
    entries, _ = listed(str(tmp_path / "l.csv"))
    assert entries == [Entry("s3://b/1.jpg", 0, "abc", datetime(2021, 2, 18, 20, 55, tzinfo=timezone.utc)), Entry("s3://b/2.jpg")]


def test_a_comma_in_a_name_cuts_no_uri_short(tmp_path: Path) -> None:
    """In a list of one column it is part of the name; among other columns it must be quoted, or the line is noted."""
    (tmp_path / "one.csv").write_text('s3://b/x.jpg\ns3://b/1,2.jpg\n"s3://b/3,4.jpg"\n')
    assert [e.uri for e in listed(str(tmp_path / "one.csv"))[0]] == ["s3://b/x.jpg", "s3://b/1,2.jpg", "s3://b/3,4.jpg"]
    (tmp_path / "two.csv").write_text('sol,uri\n1,s3://b/1,2.jpg\n1,"s3://b/3,4.jpg"\n1\n')
    entries, tally = listed(str(tmp_path / "two.csv"))
    assert [e.uri for e in entries] == ["s3://b/3,4.jpg"] and tally.unreadable == 2


@pytest.mark.parametrize("name", ["l.txt", "l.csv"])
def test_a_list_with_garbage_keeps_every_good_line(tmp_path: Path, name: str) -> None:
    """Bytes that are no text, stray quotation marks, a line without end, unknown schemes: each costs its own line."""
    garbage = [b"\xff\xfe\x00", b"a\x00b.jpg", b"foo://x/1.jpg", b"\x1b[31m", b"x" * 200_000, b"caf\xe9.jpg"]
    good = [f"s3://b/{i}.jpg".encode() for i in range(54)]
    lines = [line for i in range(6) for line in [*good[9 * i : 9 * i + 9], garbage[i]]]
    (tmp_path / name).write_bytes(b"\n".join([*lines, b'"unclosed.jpg', b"s3://b/last.jpg"]))
    entries, tally = listed(str(tmp_path / name))
    uris = [e.uri for e in entries]
    assert [u for u in uris if u.startswith("s3://")] == [g.decode() for g in good] + ["s3://b/last.jpg"]
    assert tally.unreadable == 6 and tally.files == 62
    assert all(f"{name}:" in e for e in tally.examples), "each says its line"
    assert len("".join(tally.examples)) < 2000


def test_nulls_in_a_parquet_list_are_noted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["s3://b/1.jpg", None, "", "s3://b/2.jpg"]}), tmp_path / "l.parquet")
    entries, tally = listed(str(tmp_path / "l.parquet"))
    assert [e.uri for e in entries] == ["s3://b/1.jpg", "s3://b/2.jpg"] and tally.unreadable == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("l.csv", b"name,place\na,b\n", "no column uri in name, place"),
        ("l.parquet", b"PAR1 and no more", "can't be read as a list"),
        ("l.parquet", b"", "can't be read as a list"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        listed(str(tmp_path / name))


def test_a_parquet_table_without_uris_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"name": ["x"]}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match="no column uri in name"):
        listed(str(tmp_path / "l.parquet"))


# --- one spelling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "base", "wanted"),
    [
        ("/a//b/./c/../d.jpg", "", "/a/b/d.jpg"),
        ("file:///a/b.jpg", "", "/a/b.jpg"),
        ("b.jpg", "/a", "/a/b.jpg"),
        ("b.jpg", "s3://a/x", "s3://a/x/b.jpg"),
        ("/b.jpg", "s3://a/x", "/b.jpg"),
        ("S3A://a/b.jpg", "", "s3://a/b.jpg"),
        ("memory://a/b.jpg", "", "memory:///a/b.jpg"),
        ("HTTPS://host/A%20b.jpg?x=1", "", "https://host/A%20b.jpg?x=1"),
        ("zip://a.jpg::b.zip", "/x", "zip://a.jpg::/x/b.zip"),
        ("zip://a.jpg::s3a://b/c.zip", "", "zip://a.jpg::s3://b/c.zip"),
    ],
)
def test_a_file_has_one_spelling(uri: str, base: str, wanted: str) -> None:
    assert canonical(uri, base) == wanted
    assert canonical(wanted) == wanted


def test_addresses_that_cannot_be_and_sizes_that_no_file_has_cost_their_own_line(root: str) -> None:
    lines = ["http://[oops/a.jpg", "http://ho\u2100st/b.jpg", "http://[::1]:8000/c.jpg", "http://host/d.jpg"]
    found, tally = listed(text_list(root, lines))
    assert [entry.uri for entry in found] == ["http://host/d.jpg"]
    assert tally.unreadable == 3 and "IPv6" in tally.examples[2]
    write_bytes(f"{root}/sizes.csv", b"uri,size\ns3://b/a.jpg,99999999999999999999999\ns3://b/b.jpg,7\ns3://b/c.jpg,-1\n")
    assert [entry.size for entry in listed(f"{root}/sizes.csv")[0]] == [None, 7, None]
    index([text_list(root, lines)], f"{root}/manifest")
