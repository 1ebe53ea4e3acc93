"""Fetching one image: whole, within limits of bytes and seconds, from stores that drip, hang or refuse."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from raysal.archive.uris import fetch_image, fetch_label
from raysal.errors import ImageError


class Slow(http.server.BaseHTTPRequestHandler):
    """``/drip`` sends a byte at a time, ``/hang`` nothing, ``/endless`` never stops, ``/403`` refuses, ``/a.xml`` is there."""

    def do_GET(self) -> None:
        if self.path == "/403.jpg":
            return self.send_error(403)
        if self.path not in ("/drip.jpg", "/hang.jpg", "/endless.jpg", "/a.xml"):
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/a.xml":
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
    server.daemon_threads, server.over = True, threading.Event()
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
