"""Hostile requests to an endpoint: damaged images, false headers, broken forms. It answers each, or hangs up, and goes on.

    python benchmarks/hostile.py

`raysal serve` runs as a user runs it. Requests go over raw sockets where a client library would mend them. An answer must have a documented
status, say as problem+json what was wrong, and come within the deadline. What is no HTTP at all is answered by the server's own parser,
with 400 in plain text. Pages that take no body must say so at once, not wait for one. After each round a good image must get the mask that
it had before. Memory of the replicas is sampled between the rounds: what is sent in the first round is sent again.
"""

from __future__ import annotations

import io
import json
import random
import socket
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from common import Claim, options, write
from parts.endpoint import endpoint
from parts.scenes import scenes, untrained
from PIL import Image

from raysal.serving.problems import STATUSES, TYPE

DOCUMENTED = {200, *STATUSES} - {500}
UNWANTED = {401, 405}
"""Statuses of a request that brings a body to a page which takes none."""

UNFINISHED = "a body that never ends for"
PATIENCE_S, UNFINISHED_S = 40.0, 3.0


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A small PNG whose header promises side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def chunks(count: int) -> bytes:
    """A PNG of one pixel with many chunks that mean nothing."""
    head, data = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), zlib.compress(b"\0\0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + count * chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tile_bomb(side: int) -> bytes:
    """A small TIFF of 64 x 64 pixels whose only tile promises side x side."""
    data = zlib.compress(bytes(64 * 64))
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 0), (325, len(data))]
    at = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, at if tag == 324 else value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


def long_label(size: int) -> bytes:
    """A VICAR image of one pixel with a label of many entries."""
    system = f"LBLSIZE={size:<10}FORMAT='BYTE' TYPE='IMAGE' ORG='BSQ' NL=1 NS=1 NB=1 RECSIZE=1 NBB=0 NLB=0 INTFMT='LOW' TASK='A' "
    return (system + "A='b' " * (size // 6)).encode()[:size] + b"\x40"


def saved(image: Image.Image, kind: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def images(good: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Bodies that claim to be images."""
    picture = Image.open(io.BytesIO(good)).convert("RGB")
    small, turned = picture.resize((4, 4)), Image.Exif()
    turned[274] = 6
    forms = {
        "jpeg": saved(picture, "JPEG"),
        "png": good,
        "tiff": saved(picture, "TIFF"),
        "cmyk": saved(picture.convert("CMYK"), "JPEG"),
        "grey16": saved(Image.fromarray(np.arange(9216, dtype=np.uint16).reshape(96, 96)), "PNG"),
        "exif": saved(picture, "JPEG", exif=turned),
        "alpha": saved(picture.convert("RGBA"), "PNG"),
        "palette": saved(picture.convert("P"), "PNG"),
        "bit": saved(picture.convert("1"), "PNG"),
        "float": saved(Image.fromarray(np.full((20, 20), np.nan, np.float32)), "TIFF"),
        "pixel": saved(picture.resize((1, 1)), "PNG"),
        "row": saved(picture.resize((4000, 1)), "PNG"),
        "column": saved(picture.resize((1, 4000)), "PNG"),
        "progressive": saved(picture, "JPEG", progressive=True),
    }
    frames = {
        "gif": saved(picture, "GIF", save_all=True, append_images=[picture.rotate(90)]),
        "apng": saved(picture, "PNG", save_all=True, append_images=[picture.rotate(90)]),
        "pages": saved(picture, "TIFF", save_all=True, append_images=[picture]),
    }
    plain = {
        "empty": b"",
        "text": b"not an image",
        "html": b"<html>404</html>",
        "zero": bytes(10_000),
        "bomb": bomb(30_000),
        "larger bomb": bomb(2**31 - 1),
        "pds3": b"PDS_VERSION_ID = PDS3\r\nRECORD_BYTES = 99999999\r\n^IMAGE = 7\r\nEND\r\n",
        "odl": b"PDS_VERSION_ID = " + b"(" * 50_000,
        "vicar": b"LBLSIZE=99999999  FORMAT='BYTE'",
        "vicar text": b"LBLSIZE=" + b"1" * 1000,
        "thin": saved(picture.resize((1, 60_000)), "PNG"),
        "thin and flat": saved(picture.resize((60_000, 1)), "PNG"),
        "many frames": saved(small, "TIFF", save_all=True, append_images=[small] * 2000),
        "tile bomb": tile_bomb(32_000),
        "larger tile bomb": tile_bomb(2**31 - 16),
        "vicar with a long label": long_label(4_000_000),
        "many chunks": chunks(200_000),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "zip": b"PK\x03\x04" + bytes(100),
        "pickle": b"\x80\x04\x95" + bytes(50),
        "pdf": b"%PDF-1.7",
        "heic": b"\x00\x00\x00\x18ftypheic",
    }
    yield from (forms | frames | plain).items()
    for n in range(count):
        kind = rng.choice([*forms])
        data = bytearray(forms[kind])
        how = rng.randrange(4)
        if how == 0:
            del data[rng.randrange(len(data)) :]
        elif how == 1:
            for _ in range(rng.randrange(1, 40)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif how == 2:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randrange(1, 2000))
        else:
            at = rng.randrange(len(data))
            del data[at : at + rng.randrange(1, 500)]
        yield f"{kind}, mutated {n}", bytes(data)


def raw(host: str, port: int, good: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Whole requests, as bytes."""
    top = f"POST /v1/masks HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n".encode()
    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + good + b"\r\n--b--\r\n"
    multipart = top + b"Content-Type: multipart/form-data; boundary=b\r\n"

    def sized(head: bytes, body: bytes) -> bytes:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    yield "more promised than sent", top + b"Content-Length: 99999\r\n\r\n" + good[:100]
    yield "a length of 10 TB", top + b"Content-Length: 10000000000000\r\n\r\n"
    yield "a negative length", top + b"Content-Length: -5\r\n\r\n" + good
    yield "a length in words", top + b"Content-Length: many\r\n\r\n" + good
    yield "two lengths", top + b"Content-Length: 5\r\nContent-Length: 500\r\n\r\n" + good
    yield "length and chunks", top + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    yield "chunks of no size", top + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n"
    yield "a huge chunk", top + b"Transfer-Encoding: chunked\r\n\r\nffffffffffff\r\nhello"
    yield "no request", b"\x00\xff" * 500
    yield "TLS to a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300)
    yield "a long path", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    yield "many headers", top + b"".join(b"X-%d: y\r\n" % n for n in range(5000)) + b"\r\n"
    yield "a long header", top + b"X-Image-Name: " + b"a" * 200_000 + b"\r\n\r\n"
    yield "climbing", f"GET /../../etc/passwd HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    yield "another host", sized(top.replace(host.encode(), b"evil.example"), good)
    yield "a form", sized(multipart, form)
    yield "a form without end", sized(multipart, form[:-9])
    yield "a form of nothing", sized(multipart, b"")
    yield "a form of another boundary", sized(multipart, form.replace(b"--b", b"--c"))
    yield "a form of a hundred images", sized(multipart, form[:-6] * 100 + b"--b--\r\n")
    yield "a form without names", sized(multipart, form.replace(b'name="image"; ', b""))
    yield "a form with a hostile name", sized(multipart, form.replace(b"a.png", b"../../../etc/passwd\\x00.png"))
    yield "a form with a name of no text", sized(multipart, form.replace(b"a.png", b"\xff\xfe\xfd.png"))
    for path in ("/", "/docs", "/openapi.json", "/static/page.js", "/examples/0", "/v1/healthz", "/v1/readyz", "/v1/model"):
        for whose, header in (("mine", b""), ("a stranger's", b"X-Forwarded-For: 203.0.113.9\r\n")):
            head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n".encode()
            yield f"{UNFINISHED} {path}, {whose}", head + header + b"Content-Length: 60000000\r\n\r\n" + good[:100]
    for uri in (
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "http://127.0.0.1:8265/api",
        "/etc/passwd",
        "s3://x/y",
        "::",
        "a\x00b",
        "zip://a::b",
    ):
        yield f"uri {uri!r}", sized(top + b"Content-Type: application/json\r\n", json.dumps({"uri": uri}).encode())
    for body in (b"{", b"[]", b"null", b'{"uri": 5}', b'{"uri": "' + b"a" * 500_000 + b'"}', b"[" * 100_000, b'{"uri":"\\ud800"}'):
        yield f"json {body[:12]!r}", sized(top + b"Content-Type: application/json\r\n", body)
    for accept in ("*/*;q=x", "text/html", ",,,;;;", "image/png;q=0", "a" * 5000):
        yield f"accept {accept[:12]!r}", sized(top + f"Accept: {accept}\r\n".encode(), good)
    for seconds in ("-1", "0", "nan", "inf", "1e400", "soon", "0.0001"):
        yield f"deadline {seconds}", sized(top + f"X-Deadline-Seconds: {seconds}\r\n".encode(), good)
    for view in ("x", "index&view=colour", "%00", "../..", "a" * 5000):
        yield f"view {view[:12]!r}", sized(top.replace(b"/v1/masks", f"/v1/masks?view={view}".encode()), good)
    for method in ("GET", "PUT", "DELETE", "TRACE", "CONNECT", "PATCH", "BREW"):
        yield f"method {method}", top.replace(b"POST", method.encode()) + b"\r\n"
    whole = sized(multipart, form)
    for n in range(count):
        data = bytearray(whole)
        end = data.index(b"\r\n\r\n", data.index(b"\r\n\r\n") + 4)  # headers of the request and of its form
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(end)] = rng.randrange(256)
        yield f"a mutated form {n}", bytes(data)


def send(host: str, port: int, request: bytes) -> tuple[int, str]:
    """Status and type of the answer; 0 where the endpoint hung up without one. Raises TimeoutError where it does neither.

    A request that goes on for longer than anybody waits is broken off, as clients do.
    """
    with socket.create_connection((host, port), timeout=UNFINISHED_S) as connection:
        try:
            connection.sendall(request)
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                connection.settimeout(PATIENCE_S)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            return 0, ""
    first, _, rest = answer.partition(b"\r\n\r\n")[0].partition(b"\r\n")
    words = first.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        return 0, ""
    headers = dict(line.lower().split(b": ", 1) for line in rest.split(b"\r\n") if b": " in line)
    return int(words[1]), headers.get(b"content-type", b"").decode("latin-1")


def fault(what: str, status: int, kind: str) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if status == 0:
        return None  # hung up, as a server may on what is no request
    if status not in DOCUMENTED:
        return "not documented"
    if what.startswith(UNFINISHED) and status not in UNWANTED:
        return "waited for a body that it does not take"
    unread = status == 400 and kind.startswith("text/plain")  # the HTTP server's own answer to what is no HTTP
    return None if status == 200 or kind == TYPE or unread else f"no problem but {kind!r}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--mutated", type=int, default=400, help="mutated images of a round; as many forms by half")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    mutated, rounds = (20, 2) if args.quick else (args.mutated, args.rounds)
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    memory, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        good = Path(scenes(scratch / "archive", 1, 96)[0]).read_bytes()
        with endpoint(untrained(scratch / "checkpoint", 96)) as up, httpx.Client(timeout=PATIENCE_S) as client:
            host, port = up.url.removeprefix("http://").split(":")

            def mask() -> bytes:
                response = client.post(f"{up.url}/v1/masks", content=good)
                response.raise_for_status()
                return response.content

            def count(what: str, status: int, kind: str, began: float) -> None:
                nonlocal slowest
                slowest = max(slowest, time.perf_counter() - began)
                statuses[status] += 1
                if bad := fault(what, status, kind):
                    wrong.append(f"{what}: {status}, {bad}")

            first = mask()
            sent = 0
            for _ in range(rounds):
                rng = random.Random(0)
                for what, body in images(good, rng, mutated):
                    began = time.perf_counter()
                    response = client.post(f"{up.url}/v1/masks", content=body)
                    count(what, response.status_code, response.headers.get("content-type", ""), began)
                    sent += 1
                for what, request in raw(host, int(port), good, rng, mutated // 2):
                    began = time.perf_counter()
                    try:
                        count(what, *send(host, int(port), request), began)
                    except TimeoutError:
                        wrong.append(f"{what}: neither answered nor hung up")
                    sent += 1
                if mask() != first:
                    wrong.append("a good image has another mask")
                memory.append(up.resident_mb())
            restarted = up.restarts()
    per_round = sent // rounds
    claims = [
        Claim(
            f"of {sent:,} hostile requests ({per_round} kinds, {rounds} times): wrong answers, hangs, wrong masks",
            len(wrong),
            0,
            "lower",
            "",
        ),
        Claim("replicas that died", restarted, 0, "lower", ""),
        Claim("memory of the replica after the last round / after the first", memory[-1] / memory[0], 1.1, "lower", "x"),
        Claim("longest answer", slowest, PATIENCE_S, "lower", "s"),
    ]
    told = ", ".join(f"{n} x {status or 'hung up'}" for status, n in sorted(statuses.items()))
    notes = f"Statuses: {told}. Memory after each round: {', '.join(f'{m:.0f} MB' for m in memory)}."
    notes += "".join(f"\n- {line}" for line in dict.fromkeys(wrong))
    write("hostile", "Hostile requests", claims, args.out, notes)


if __name__ == "__main__":
    main()
