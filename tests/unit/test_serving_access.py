"""Who may ask the endpoint, for what, and how much at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from raysal.errors import InputError
from raysal.serving.app import make_app
from raysal.serving.intake import Upload, allowed, check_roots, fetch, read
from raysal.serving.meters import Meters
from raysal.serving.problems import Problem
from raysal.serving.service import Service, Share, Work
from raysal.serving.settings import Limits, Settings
from raysal.serving.tokens import Tokens
from tests.unit.endpoint import EAGER, SCENE, TOKEN, ask, encoded, problem

# --- who may ask ------------------------------------------------------------------------------------------------------


def test_without_tokens_only_this_machine_is_answered(trained: Path) -> None:
    async def refused(http: httpx.AsyncClient, _: Service) -> None:
        assert "openssl" in problem(await http.get("/v1/model"), 401, "token")
        assert (await http.get("/v1/readyz")).status_code == 200

    async def answered(http: httpx.AsyncClient, _: Service) -> None:
        assert (await http.get("/v1/model")).status_code == 200
        problem(await http.get("/v1/model", headers={"x-forwarded-for": "203.0.113.9"}), 401, "token")

    ask(trained, answered)
    ask(trained, answered, client="::1", host="localhost")
    ask(trained, refused, client="203.0.113.9")
    ask(trained, refused, host="rebound.example")


class Notes(Meters):
    """Keeps what was counted."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []

    def request(self, route: str, status: int, seconds: float) -> None:
        self.requests.append((route, status))


@pytest.mark.parametrize("path", ["/", "/docs", "/static/page.js", "/v1/healthz", "/nowhere"])
def test_no_body_is_read_where_none_is_wanted(trained: Path, path: str) -> None:
    read: list[bytes] = []

    async def body() -> object:
        read.append(b"x")
        yield b"x"

    async def stranger(http: httpx.AsyncClient, _: Service) -> None:
        problem(await http.post(path, content=body()), 401, "token")

    async def friend(http: httpx.AsyncClient, _: Service) -> None:
        status = 404 if path == "/nowhere" else 405
        problem(await http.post(path, content=body(), headers={"authorization": f"Bearer {TOKEN}"}), status, "http")

    ask(trained, stranger, client="203.0.113.9", tokens=TOKEN)
    ask(trained, friend, client="203.0.113.9", tokens=TOKEN)
    assert not read


def test_who_may_not_ask_is_told_nothing_of_the_model_but_is_counted_by_path(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        for path in ("/", "/docs", "/v1/healthz", "/v1/readyz", "/openapi.json", "/static/page.css"):
            response = await http.get(path)
            assert response.status_code == 200 and "x-model-digest" not in response.headers, path
        assert "x-model-digest" not in (await http.post("/v1/masks")).headers
        assert service.model is not None
        mine = await http.get("/v1/model", headers={"authorization": f"Bearer {TOKEN}"})
        assert mine.headers["x-model-digest"] == service.model.digest
        problem(await http.post("/v1/masks", content=b"x" * 2000, headers={"authorization": f"Bearer {TOKEN}"}), 413, "bytes")
        await http.get("/static/none")
        await http.get("/made/up/4711")
        assert notes.requests[-5:] == [("/v1/masks", 401), ("/v1/model", 200), ("/v1/masks", 413), ("/static/{name}", 404), ("other", 401)]

    notes = Notes()
    ask(trained, asked, client="203.0.113.9", tokens=TOKEN, meters=notes, limits=Limits(max_bytes=1000))


def test_any_of_several_tokens_is_good_and_a_file_is_read_again(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# of October\n\n{TOKEN}\n")

    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        async def status(token: str) -> int:
            return (await http.get("/v1/model", headers={"authorization": token.encode()})).status_code

        second = "another-token-of-some-length"
        assert [await status(t) for t in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Bearer {second}")] == [200, 200, 401]
        assert [await status(t) for t in ("", TOKEN, f"Basic {TOKEN}", "Bearer ", "Bearer \xe4")] == [401] * 5
        file.write_text(f"{second}\n")
        assert [await status(f"Bearer {t}") for t in (TOKEN, second)] == [401, 200]
        file.unlink()
        assert await status(f"Bearer {second}") == 200  # a file that is being replaced locks nobody out

    ask(trained, asked, client="203.0.113.9", tokens_file=str(file))
    for text in ("short\n", "\xff"):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match="token"):
            Tokens(str(file), {})


def test_uris_reach_what_lies_under_the_roots_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    root, outside = tmp_path / "open", tmp_path / "open-not"
    for folder in (root, outside):
        folder.mkdir()
        (folder / "scene.png").write_bytes(encoded(SCENE))
    (root / "link.png").symlink_to(outside / "scene.png")
    (root / "inner.png").symlink_to(root / "scene.png")

    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        async def answer(uri: str) -> httpx.Response:
            return await http.post("/v1/masks", json={"uri": uri})

        for good in (f"{root}/scene.png", f"file://{root}/scene.png", f"{root}/inner.png"):
            assert (await answer(good)).status_code == 200, good
        for bad in (
            f"{outside}/scene.png", f"{root}/../open-not/scene.png", f"{root}/link.png", str(root), "/etc/passwd", "http://127.0.0.1/x.png",
            f"zip://scene.png::{root}/x.zip", f"simplecache::{root}/scene.png", f"{root}/none.png", "", "\x00", "nonsense://x",
            "http://169.254.169.254/latest/meta-data", f"{root}/%2e%2e/open-not/scene.png",
        ):  # fmt: skip
            problem(await answer(bad), 422, "uri")

    ask(trained, asked, roots=(str(root),))


def test_a_label_beside_a_uri_lies_under_the_roots_too(tmp_path: Path) -> None:
    root, outside = tmp_path / "open", tmp_path / "secret"
    for folder in (root, outside):
        folder.mkdir()
    (root / "a.img").write_bytes(b"pixels")
    (outside / "a.lbl").write_bytes(b"a secret")
    (root / "a.lbl").symlink_to(outside / "a.lbl")
    with pytest.raises(Problem, match="no image under the places"):
        fetch(str(root / "a.img"), [str(root)], Limits())
    (root / "a.lbl").unlink()
    (root / "a.lbl").write_bytes(b"a label")
    assert fetch(str(root / "a.img"), [str(root)], Limits()).label == b"a label"


def test_roots_are_folders_of_stores_that_can_be_kept_to() -> None:
    check_roots(("/data/images", "s3://bucket/images"))
    for bad in ("http://example.org/images", "https://example.org", "zip://x::/data/a.zip", "ftp://host/x"):
        with pytest.raises(InputError, match="roots"):
            check_roots((bad,))
    with pytest.raises(InputError, match="send the image"):
        allowed("s3://bucket/images-private/x.png", ("s3://bucket/images",))
    assert allowed("s3://bucket/images/x.png", ("s3://bucket/images/",)) == "s3://bucket/images/x.png"
    with pytest.raises(ValueError, match="whole of a store"):
        Settings(checkpoint="x", roots=("/",))


# --- load -------------------------------------------------------------------------------------------------------------


def test_more_requests_than_there_are_places_are_turned_away_at_once(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        gate, real = asyncio.Event(), service.batched

        async def held(work: Work) -> object:
            await gate.wait()
            return await real(work)

        service.batched = held  # type: ignore[assignment]
        first = [asyncio.ensure_future(http.post("/v1/masks", content=encoded(SCENE))) for _ in range(2)]
        await asyncio.sleep(0.2)
        response = await http.post("/v1/masks", content=encoded(SCENE))
        problem(response, 429, "busy")
        assert int(response.headers["retry-after"]) >= 1
        assert (await http.get("/v1/healthz")).status_code == 200
        gate.set()
        assert [(await f).status_code for f in first] == [200, 200]
        assert (await http.post("/v1/masks", content=encoded(SCENE))).status_code == 200

    ask(trained, asked, limits=Limits(in_flight=2))


def test_a_deadline_ends_the_work_and_frees_its_place(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        works: list[Work] = []

        async def never(work: Work) -> object:
            works.append(work)
            return await asyncio.Event().wait()

        real, service.batched = service.batched, never  # type: ignore[assignment]
        problem(await http.post("/v1/masks", content=encoded(SCENE), headers={"x-deadline-seconds": "0.2"}), 408, "deadline")
        assert works[0].stop.is_set() and works[0].picture is None, "a queue that keeps the work must not keep its pixels"
        service.batched = real
        assert (await http.post("/v1/masks", content=encoded(SCENE))).status_code == 200

    ask(trained, asked, limits=Limits(in_flight=1))


def test_pixels_count_as_held_until_their_answer_is_encoded(trained: Path) -> None:
    async def asked(_: httpx.AsyncClient, service: Service) -> None:
        held = service._held
        upload, most = Upload("a", encoded(SCENE)), held.total
        found = await service.answer(upload, frozenset({"mask"}), lambda done: (done.mask.mask_HW.shape, most - held._free))
        assert found.body == (SCENE.shape[:2], SCENE.shape[0] * SCENE.shape[1]) and held._free == most
        assert not any(isinstance(value, np.ndarray) for value in vars(found).values())

    ask(trained, asked)


def test_work_that_was_given_up_is_not_computed_with_its_batch(trained: Path) -> None:
    async def asked(_: httpx.AsyncClient, service: Service) -> None:
        picture = read(Upload("a", encoded(SCENE)), service.settings.limits, True)
        works = [Work(picture, frozenset({"mask"}), picture.pixels) for _ in range(3)]
        works[1].end()
        asked_of: list[int] = []
        of = service.model.masks.of
        service.model.__dict__["masks"] = SimpleNamespace(of=lambda images, go_on: asked_of.append(len(images)) or of(images, go_on))
        found = await service.forward(works)
        assert asked_of == [2] and [isinstance(f, Problem) for f in found] == [False, True, False] and found[1].status == 408

    ask(trained, asked)


def test_a_slow_upload_holds_no_place(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        begun = asyncio.Event()

        async def drops() -> object:
            yield b"\x89PNG"
            begun.set()
            await asyncio.sleep(30)
            yield b"more"

        slow = [asyncio.ensure_future(http.post("/v1/masks", content=drops())) for _ in range(3)]
        await begun.wait()
        assert (await http.post("/v1/masks", content=encoded(SCENE))).status_code == 200  # the only place is free
        for upload in slow:
            problem(await upload, 408, "slow")

    ask(trained, asked, limits=Limits(in_flight=1, upload_s=2.0))


def test_uploads_at_once_are_bounded(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        begun = asyncio.Event()

        async def drops() -> object:
            begun.set()
            await asyncio.sleep(30)
            yield b"more"

        slow = asyncio.ensure_future(http.post("/v1/masks", content=drops()))
        await begun.wait()
        problem(await http.post("/v1/masks", content=encoded(SCENE)), 429, "busy")
        problem(await slow, 408, "slow")
        assert (await http.post("/v1/masks", content=encoded(SCENE))).status_code == 200

    ask(trained, asked, limits=Limits(uploads=1, upload_s=0.5))


def test_a_client_that_goes_away_costs_nothing_more(trained: Path) -> None:
    async def run() -> None:
        made = Settings(checkpoint=str(trained), runtime=EAGER, threads=1)
        service = Service(made, Meters())
        await service.use(made.first)
        works: list[Work] = []

        async def never(work: Work) -> object:
            works.append(work)
            return await asyncio.Event().wait()

        service.batched = never  # type: ignore[assignment]
        app, sent = make_app(service, Tokens(None, {}), proxied=False), []
        messages = [{"type": "http.request", "body": encoded(SCENE), "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop(0)
            while not works:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        scope: dict = {
            "type": "http",
            "method": "POST",
            "path": "/v1/masks",
            "raw_path": b"/v1/masks",
            "query_string": b"",
            "scheme": "http",
        }
        scope |= {"headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
        scope |= {"http_version": "1.1", "root_path": ""}
        await asyncio.wait_for(app(scope, receive, send), 20)
        assert works[0].stop.is_set() and not sent

    asyncio.run(run())


def test_shares_are_given_in_turn_and_come_back() -> None:
    async def run() -> None:
        share, order = Share(10), []

        async def take(name: str, amount: int) -> None:
            async with share.of(amount):
                order.append(name)
                await asyncio.sleep(0.01)

        await asyncio.gather(take("a", 8), take("large", 99), take("b", 1))
        assert order == ["a", "large", "b"]
        async with share.of(10):
            pass

    asyncio.run(run())
