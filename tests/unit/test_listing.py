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
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysal.archive import fetch, listing
from raysal.archive.entries import Tally
from raysal.archive.fetch import fetch_image
from raysal.archive.index import index
from raysal.archive.listing import open_place
from raysal.archive.uris import canonical, write_bytes
from raysal.errors import InputError, RaysalError
from tests.manifests import listed

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
    """Pages of links, and two folders that are refused; while it is busy, it tells of no file."""

    busy = False

    def do_GET(self) -> None:
        if self.busy and not self.path.endswith("/"):
            self.send_error(503)
        elif "refused" in self.path:
            self.send_error(403)
        elif "gone" in self.path:
            self.send_error(404)
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        if "unasked" in self.path or self.busy:
            self.send_error(503)
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


def test_files_of_a_busy_server_are_as_they_were(web: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not changed, and not gone: nothing is done again, or taken out, because a server was too busy to tell of a file."""
    monkeypatch.setattr(fetch, "PAUSES", (0.01,))
    root, url = web
    fill(root, {"a/1.jpg": True, "a/2.jpg": True})
    (root / "a/index.html").write_text('<a href="1.jpg">1</a><a href="2.jpg">2</a>')
    out = str(tmp_path / "manifest")
    assert index([f"{url}/a/"], out).new == 2
    monkeypatch.setattr(Server, "busy", True)
    busy = index([f"{url}/a/"], out, prune=True)
    assert (busy.rows, busy.changed, busy.gone, busy.unreadable) == (2, 0, 0, 2) and "503" in busy.examples[0]
    monkeypatch.setattr(Server, "busy", False)
    again = index([f"{url}/a/"], out)
    assert (again.same, again.changed, again.unreadable) == (2, 0, 0)


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


def test_labels_stay_with_their_images_in_long_s3_listings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "TOGETHER", 3)
    keys = [f"NLB.{n:04d}{suffix}" for n in range(5) for suffix in (".dat", ".xml")] + ["other.img"]
    groups = [[o["Key"] for o in group] for group in listing._beside({"Key": key} for key in keys)]
    assert [key for group in groups for key in group] == keys and max(map(len, groups)) == 4
    assert all(f"NLB.{n:04d}.xml" in group for group in groups for n in range(5) if f"NLB.{n:04d}.dat" in group)
