"""Listings: every store tells the same of the same archive, and what can't be read is said, never lost."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysal.archive import listing
from raysal.archive.entries import Entry, Tally
from raysal.archive.listing import open_place
from raysal.archive.uris import canonical, fetch_image, write_bytes
from raysal.errors import InputError, RaysalError

ARCHIVE = {
    "sol/03027/NLB_516721703EDR_F0540992CCAM15900M1.IMG": True,
    "sol/03027/NLB_516721703EDR_F0540992CCAM15900M1.LBL": False,
    "top.JPG": True,
    "b c/ünï cödé 火星.png": True,
    "b c/per%20cent #1?.tif": True,
    "pds4/i943630r.raw": True,
    "pds4/i943630r.xml": False,
    "pds4/UPPER.DAT": True,
    "pds4/UPPER.XML": False,
    "pds4/no label.raw": False,
    "notes.txt": False,
    "no_suffix": False,
}
"""Files of an archive, and whether each is an image."""
IMAGES = sorted(name for name, is_image in ARCHIVE.items() if is_image)


class Server(http.server.SimpleHTTPRequestHandler):
    """Pages of links, and two folders that are refused."""

    def do_GET(self) -> None:
        if "refused" in self.path:
            self.send_error(403)
        elif "gone" in self.path:
            self.send_error(404)
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        if "unasked" in self.path:
            self.send_error(500)
        else:
            super().do_HEAD()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that serves it."""
    root = tmp_path / "web"
    root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fill(root: Path, names: dict[str, bool] = ARCHIVE) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.fixture(params=["local", "memory", "zip", "http", "s3"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same archive in each kind of store."""
    if request.param == "local":
        return str(fill(tmp_path / "archive"))
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "an archive.zip", "w") as file:
            for name in ARCHIVE:
                file.writestr(name, name.encode())
        return str(tmp_path / "an archive.zip")
    if request.param == "http":
        root, url = request.getfixturevalue("web")
        fill(root)
        return str(url)
    root = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    for name in ARCHIVE:
        write_bytes(f"{root}/{name}", name.encode())
    return root


def listed(uri: str) -> tuple[list[Entry], Tally]:
    tally, place = Tally(), open_place(uri)
    return place.complete(list(place.entries(tally))), tally


# --- places -----------------------------------------------------------------------------------------------------------


def test_every_store_lists_the_same_images_and_can_give_them(archive: str) -> None:
    """With spaces, unicode, percent signs and labels; each URI of the listing fetches the very file."""
    entries, tally = listed(archive)
    assert sorted(fetch_image(e.uri, 1000).decode() for e in entries) == IMAGES
    assert [e.size for e in entries] == [len(fetch_image(e.uri, 1000)) for e in entries]
    assert (tally.files, tally.labels, tally.others, tally.unreadable) == (len(ARCHIVE), 3, 3, 0)
    assert all(canonical(e.uri) == e.uri for e in entries)
    assert all(e.etag or e.modified for e in entries), "nothing would tell a changed file"
    assert all(open_place(archive).holds(e.uri) for e in entries)


def test_a_listing_is_in_order_and_the_same_each_time(archive: str) -> None:
    first, again = listed(archive)[0], listed(archive)[0]
    assert first == again
    folders = [e.uri.split("::")[0].rpartition("/")[0] for e in first]
    assert sorted(folders, key=folders.index) == folders and len(set(folders)) == 4, "files of one folder lie together"


def test_part_of_an_archive_is_a_place(archive: str) -> None:
    part = archive.replace(archive, f"zip://pds4::{archive}") if archive.endswith(".zip") else f"{archive}/pds4/"
    entries, tally = listed(part)
    assert sorted(fetch_image(e.uri, 1000).decode() for e in entries) == ["pds4/UPPER.DAT", "pds4/i943630r.raw"]
    assert tally.files == 5
    assert all(open_place(archive).holds(e.uri) and open_place(part).holds(e.uri) for e in entries)
    assert not open_place(part).holds(next(e.uri for e in listed(archive)[0] if "top" in e.uri))


@pytest.mark.parametrize("name", ["top.JPG", "pds4/i943630r.raw"])
def test_one_image_is_a_place(archive: str, name: str) -> None:
    if archive.endswith(".zip"):
        pytest.skip("a file inside a zip file is no place; its folder is")
    entries, _ = listed(f"{archive}/{name}")
    assert [(fetch_image(e.uri, 1000).decode(), e.size) for e in entries] == [(name, len(name))]


def test_a_zip_file_in_a_store_is_a_place(tmp_path: Path, s3: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x/a.jpg", b"abc")
    uri = f"{s3}/{uuid.uuid4().hex}/a.zip"
    write_bytes(uri, (tmp_path / "a.zip").read_bytes())
    for place in (uri, f"zip://*::{uri}", f"zip://x::{uri}"):
        assert [e.uri for e in listed(place)[0]] == [f"zip://x/a.jpg::{uri}"]
    assert fetch_image(f"zip://x/a.jpg::{uri}", 10) == b"abc"


def test_pages_of_a_listing_join(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels find their images also where a page ends between them."""
    root = f"{s3}/{uuid.uuid4().hex}"
    names = [f"{i:02d}.{suffix}" for i in range(9) for suffix in ("raw", "xml")]
    for name in names:
        write_bytes(f"{root}/{name}", b"x")
    place = open_place(root)
    asked = place.fs.call_s3
    monkeypatch.setattr(place.fs, "call_s3", lambda *a, **k: asked(*a, MaxKeys=5, **k))
    tally = Tally()
    assert [e.uri.rpartition("/")[2] for e in place.entries(tally)] == [n for n in names if n.endswith("raw")]
    assert (tally.files, tally.labels) == (18, 9)


def test_a_store_that_breaks_off_is_an_error_not_a_short_listing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"{s3}/{uuid.uuid4().hex}"
    for i in range(4):
        write_bytes(f"{root}/{i}.jpg", b"x")
    place = open_place(root)
    asked = place.fs.call_s3

    def fail_later(*arguments: object, **more: object) -> object:
        if "ContinuationToken" in more:
            raise ConnectionError("reset by peer")
        return asked(*arguments, MaxKeys=2, **more)

    monkeypatch.setattr(place.fs, "call_s3", fail_later)
    with pytest.raises(RaysalError, match=r"the listing broke off.*run the same command again") as seen:
        list(place.entries(Tally()))
    assert seen.value.exit_code == 1


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("FOLDER/nope", "can't be listed.*No such file"),
        ("FOLDER/nope.csv", "can't be listed.*No such file"),
        ("FOLDER/nope.zip", "can't be listed.*No such file"),
        ("FOLDER/program.py", "is neither an image nor a list of URIs"),
        ("FOLDER/broken.zip", "can't be opened.*not a zip file"),
        ("memory://nothing/here", "can't be listed"),
        ("s4://bucket", "no such kind of store"),
        ("htps://host", "no such kind of store; did you mean https"),
        ("http://127.0.0.1:9/", "can't be listed.*Connect"),
        ("WEB/gone/", "can't be listed .not found"),
        ("WEB/refused/", "can't be listed .HTTP 403"),
    ],
)
def test_a_place_that_cannot_be_listed_is_named_with_the_cause(tmp_path: Path, web: tuple[Path, str], place: str, said: str) -> None:
    (tmp_path / "program.py").write_text("")
    (tmp_path / "broken.zip").write_text("PK and no more")
    with pytest.raises(InputError, match=said):
        open_place(place.replace("FOLDER", str(tmp_path)).replace("WEB", web[1]))


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match="install its driver"):
        open_place("gs://bucket/x")


# --- what can't be read -----------------------------------------------------------------------------------------------


def test_refused_and_missing_pages_are_noted_and_the_rest_is_listed(web: tuple[Path, str]) -> None:
    root, url = web
    fill(root, {"a/1.jpg": True, "refused/2.jpg": True, "gone/3.jpg": True, "z/4.jpg": True})
    entries, tally = listed(url)
    assert [e.uri for e in entries] == [f"{url}/a/1.jpg", f"{url}/z/4.jpg"]
    assert tally.unreadable == 2
    assert tally.examples == [f"{url}/gone/: not found", f"{url}/refused/: HTTP 403 Forbidden"]


def test_a_page_names_a_file_whose_size_nobody_tells(web: tuple[Path, str]) -> None:
    """It is listed all the same: fetching it will tell why."""
    root, url = web
    fill(root, {"unasked_refused.jpg": True, "b.jpg": True})
    entries, tally = listed(url)
    assert [(e.uri.rpartition("/")[2], e.size) for e in entries] == [("b.jpg", 5), ("unasked_refused.jpg", None)]
    assert tally.unreadable == 0


def test_links_that_sort_a_page_or_lead_elsewhere_are_no_files(web: tuple[Path, str]) -> None:
    root, url = web
    fill(root, {"a/1.jpg": True})
    links = ("?C=N;O=D", "#top", "../", "/", "/elsewhere/", "https://example.org/2.jpg", "1.jpg", f"{url}/a/1.jpg", "/a/1.jpg")
    (root / "a" / "index.html").write_text("".join(f'<a href="{link}">x</a>' for link in links))
    entries, tally = listed(f"{url}/a")
    assert [e.uri for e in entries] == [f"{url}/a/1.jpg"]
    assert (tally.files, tally.unreadable) == (1, 0)


def test_a_page_that_leads_to_itself_without_end_is_left(web: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, url = web
    fill(root, {"a/1.jpg": True})
    (root / "a" / "more").symlink_to(root / "a")
    monkeypatch.setattr(listing, "DEEPEST", 5)
    entries, tally = listed(url)
    assert len(entries) == 5 and tally.unreadable == 1
    assert "5 folders deep" in tally.examples[0]


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    """Links into the archive, up out of it, to themselves and to nothing."""
    root, other = fill(tmp_path / "archive", {"a/1.jpg": True, "b/2.jpg": True}), fill(tmp_path / "other", {"x/3.jpg": True})
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "sibling").symlink_to(root / "a")
    (root / "higher").symlink_to(tmp_path)
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "dangling.jpg").symlink_to("nothing.jpg")
    (root / "linked.jpg").symlink_to(root / "a" / "1.jpg")
    (root / "other").symlink_to(other)
    (root / "other again").symlink_to(other)
    (other / "x" / "back").symlink_to(other)
    entries, tally = listed(str(root))
    assert [os.path.relpath(e.uri, root) for e in entries] == ["linked.jpg", "a/1.jpg", "b/2.jpg", "other/x/3.jpg"]
    assert sorted(e.partition(": ")[0] for e in tally.examples) == [str(root / "dangling.jpg"), str(root / "self.jpg")]


def test_a_folder_without_the_right_to_read_it_is_noted(tmp_path: Path) -> None:
    """Root may read everything, so a process of another user looks."""
    root = fill(tmp_path / "archive", {"a/1.jpg": True, "closed/2.jpg": True, "z/3.jpg": True})
    (root / "closed").chmod(0)
    program = f"""
import os
from raysal.archive.entries import Tally
from raysal.archive.listing import open_place
list(open_place({str(root)!r}).entries(Tally()))  # modules are loaded when first needed, and may lie where only root may read
if os.geteuid() == 0:
    os.chmod({str(tmp_path)!r}, 0o755)
    for folder in {[str(p) for p in tmp_path.parents][:3]!r}:
        os.chmod(folder, os.stat(folder).st_mode | 0o055)
    os.setuid(65534)
tally = Tally()
print(*[e.uri for e in open_place({str(root)!r}).entries(tally)], tally.unreadable, tally.examples[0], sep="\\n")
"""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    finally:
        (root / "closed").chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{root}/a/1.jpg", f"{root}/z/3.jpg", "1", f"{root}/closed: Permission denied"]


def test_names_that_no_uri_can_hold_are_noted(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(b"x")
    (tmp_path / "a::b.jpg").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff\xfe.jpg")).write_bytes(b"x")
    entries, tally = listed(str(tmp_path))
    assert [e.uri for e in entries] == [f"{tmp_path}/good.jpg"]
    assert tally.unreadable == 2
    assert any("stands for a file inside another" in e for e in tally.examples) and any("no UTF-8" in e for e in tally.examples)
    assert "".join(tally.examples).encode(), "messages can be shown"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    entries, tally = listed(str(tmp_path))
    assert entries == [] and tally.examples == [f"{tmp_path}/pipe.jpg: is no regular file"]


def test_huge_folders_are_sorted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {f"{i:03d}.jpg": True for i in range(25)})
    monkeypatch.setattr(listing, "SORTED", 10)
    names = [e.uri.rpartition("/")[2] for e in listed(str(tmp_path))[0]]
    assert sorted(names) == [f"{i:03d}.jpg" for i in range(25)]
    assert names[:10] == sorted(names[:10])


# --- lists ------------------------------------------------------------------------------------------------------------


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
    fill(tmp_path, {"a.jpg": True})
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
