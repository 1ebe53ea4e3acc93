"""Fetching one image: whole, within limits of bytes and seconds, from stores that drip, hang or refuse."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from raysal.archive import fetch
from raysal.archive.fetch import fetch_image, fetch_label
from raysal.archive.tables import read_table
from raysal.archive.uris import exists, list_names, read_bytes, write_bytes
from raysal.errors import ImageError, RaysalError


class Slow(http.server.BaseHTTPRequestHandler):
    """``/drip`` sends a byte at a time, ``/hang`` nothing, ``/endless`` never stops, ``/403`` refuses, ``/a.xml`` is there,
    ``/busy`` is once it was asked twice, ``/shut`` tells nobody what is there."""

    def do_GET(self) -> None:
        if self.path == "/403.jpg" or (self.path.startswith("/shut/") and self.path != "/shut/a.LBL"):
            return self.send_error(403)
        if self.path == "/busy.jpg":
            self.server.asked += 1
            if self.server.asked < 3:
                return self.send_error(503)
        if self.path not in ("/drip.jpg", "/hang.jpg", "/endless.jpg", "/a.xml", "/busy.jpg", "/shut/a.LBL"):
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        try:
            if self.path in ("/a.xml", "/busy.jpg", "/shut/a.LBL"):
                self.wfile.write(b"<label/>")
            while self.path == "/endless.jpg":
                self.wfile.write(bytes(2**16))
            while self.path in ("/drip.jpg", "/hang.jpg") and not self.server.over.wait(0.05):
                self.wfile.write(b"x" if self.path == "/drip.jpg" else b"")
        except OSError:  # the client gave up
            pass

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads, server.over, server.asked = True, threading.Event(), 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("file", ["drip.jpg", "hang.jpg"])
def test_a_server_that_never_ends_is_given_up(slow: str, file: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(ImageError, match=r"not there after 0\.5 s.*data\.max_seconds") as caught:
        fetch_image(f"{slow}/{file}", 1000, max_seconds=0.5)
    assert caught.value.status == "fetch"


def test_a_body_without_end_is_cut_at_the_limit(slow: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(ImageError, match="more than 100000 bytes") as caught:
        fetch_image(f"{slow}/endless.jpg", 100_000, max_seconds=60)
    assert caught.value.status == "limit"


@pytest.mark.parametrize("file", ["403.jpg", "404.jpg"])
def test_what_a_server_refuses_is_a_fetch(slow: str, file: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(ImageError, match=file) as caught:
        fetch_image(f"{slow}/{file}", 1000)
    assert caught.value.status == "fetch"


def test_labels_are_found_over_http(slow: str) -> None:
    pytest.importorskip("aiohttp")
    assert fetch_label(f"{slow}/a.raw") == b"<label/>" and fetch_label(f"{slow}/b.raw") is None


def test_a_server_that_was_busy_is_asked_again(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(fetch, "PAUSES", (0.01, 0.01, 0.01))
    assert fetch_image(f"{slow}/busy.jpg", 100) == b"<label/>"


def test_labels_are_looked_for_where_a_store_does_not_tell_what_is_missing(slow: str) -> None:
    """As S3 does without the right to list: 403 for what is not there."""
    pytest.importorskip("aiohttp")
    assert fetch_label(f"{slow}/shut/a.IMG") == b"<label/>"
    assert fetch_label(f"{slow}/shut/b.IMG") is None


@pytest.mark.parametrize("what", [exists, list_names, read_bytes, read_table, lambda uri: write_bytes(uri, b"x")])
def test_a_store_that_is_not_there_is_one_line(what: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers raise types of their own, which nobody should see."""
    pytest.importorskip("s3fs")
    monkeypatch.setattr(fsspec.config, "conf", {"s3": {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"}})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").retries = 1
    with pytest.raises(RaysalError, match=r"s3://bucket/a.*run the same command again"):
        what("s3://bucket/a.parquet")


def test_s3_gives_whole_files_labels_and_limits(s3: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.pipe_file(f"{s3}/sol 7/größe.img", data := bytes(range(256)) * 9000)
    fs.pipe_file(f"{s3}/sol 7/größe.LBL", b"PDS_VERSION_ID")
    uri = f"{s3}/sol 7/größe.img"
    assert fetch_image(uri, 2**24) == data and fetch_label(uri) == b"PDS_VERSION_ID"
    with pytest.raises(ImageError, match="more than 5000 bytes"):
        fetch_image(uri, 5000)
    with pytest.raises(ImageError, match=r"none\.img") as caught:
        fetch_image(f"{s3}/none.img", 5000)
    assert caught.value.status == "fetch" and fetch_label(f"{s3}/none.img") is None


def test_a_store_that_can_not_be_interrupted_is_looked_at_between_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(bytes(3 * 2**20))
    assert len(fetch_image(str(file), 2**24)) == 3 * 2**20
    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr(time, "monotonic", partial(next, clock))
    with pytest.raises(ImageError, match="not there after 50 s"):
        fetch_image(str(file), 2**24, max_seconds=50)


def test_a_pipe_among_the_images_is_a_row_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for place in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ImageError, match="no file: a folder, a pipe or a device"):
            fetch_image(str(place), 1000, 5.0)


class Ranges(AsyncFileSystem):
    """A store whose driver reads ranges and opens no streams, as those of Google and Azure."""

    protocol = "ranges"
    cachable = False

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        return (b"0123456789" * 10)[start:end]


def test_a_store_without_streams_is_read_by_ranges() -> None:
    fsspec.register_implementation("ranges", Ranges, clobber=True)
    assert fetch_image("ranges://bucket/a.jpg", 100) == b"0123456789" * 10
    with pytest.raises(ImageError, match="more than 99 bytes"):
        fetch_image("ranges://bucket/a.jpg", 99)
