"""The endpoint without Ray: what is answered, what is refused and how, who may ask, how models are swapped."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from raysal.config import ModelConfig, RuntimeConfig
from raysal.datasets.synthetic import scene
from raysal.errors import CheckpointError, InputError
from raysal.images.masks import decode_mask
from raysal.labels import AI4MARS, S5MARS, LabelSet
from raysal.model.checkpoint import ModelInfo, load, save
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.query.scores import MAPS
from raysal.serving.app import make_app
from raysal.serving.intake import allowed, check_roots
from raysal.serving.meters import Meters
from raysal.serving.service import Service, Share, Work
from raysal.serving.settings import Gate, Limits, ModelSpec, Settings
from raysal.serving.tokens import Tokens
from tests.trained import PX

EAGER = RuntimeConfig(kind="eager")
TOKEN = "a-token-of-some-length"
JSON = {"accept": "application/json"}

Asked = Callable[[httpx.AsyncClient, Service], Awaitable[None]]


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **more: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **more)
    return file.getvalue()


SCENE = scene(0, 3, PX)[0]
TURNED = Image.Exif()
TURNED[274] = 6  # the camera was held upright


def ask(checkpoint: Path, asked: Asked, client: str = "127.0.0.1", tokens: str = "", host: str = "127.0.0.1", **settings: object) -> None:
    """Runs some requests against an endpoint of its own."""

    async def run() -> None:
        made = Settings(checkpoint=str(checkpoint), runtime=EAGER, threads=1, **settings)
        service = Service(made, Meters())
        app = make_app(service, Tokens(made.tokens_file, {"RAYSAL_TOKENS": tokens}), proxied=False)
        transport = httpx.ASGITransport(app, client=(client, 9))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
            await service.use(made.first)
            await asked(http, service)
        service.model = None  # service and app hold each other; a hundred megabytes would wait for the garbage collector

    asyncio.run(run())


def problem(response: httpx.Response, status: int, reason: str) -> str:
    """The title of a problem, which must be one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    told = response.json()
    assert told["status"] == status and told["reason"] == reason and told["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text and len(told["title"]) > 15
    return str(told["title"])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Callable[..., Path]:
    """Makes checkpoints that are like the trained one, but for something."""

    def make(name: str, noise: float = 0.0, label_set: LabelSet = S5MARS) -> Path:
        folder = tmp_path_factory.mktemp(name)
        found = load(str(trained))
        if label_set is not S5MARS:
            net = TwoBranch(ModelConfig(arch="Unet", encoder="tu-mobilenetv3_small_050"), label_set.n_classes, 0)
            save(str(folder), net, ModelInfo(label_set, net_config(net), 1.0, PX))
            return folder
        for k, parameter in enumerate(found.model.parameters()):
            generator = np.random.default_rng(k)
            parameter.data += noise * float(parameter.data.abs().mean()) * generator.standard_normal(parameter.shape).astype(np.float32)
        save(str(folder), found.model, found.info)
        return folder

    return make


def net_config(_: TwoBranch) -> ModelConfig:
    return ModelConfig(arch="Unet", encoder="tu-mobilenetv3_small_050")


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_mask_is_the_predictors_to_the_byte_whatever_the_file(trained: Path) -> None:
    expected = Predictor.load(str(trained)).masks([SCENE])[0]

    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        for kind, more in (("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
            response = await http.post("/v1/masks", content=encoded(SCENE, kind, **more))
            assert response.status_code == 200 and response.headers["content-type"] == "image/png"
            np.testing.assert_array_equal(decode_mask(response.content, 10**6, "mask"), expected)
            assert response.headers["x-model-digest"] == service.model.digest

    ask(trained, asked)


def test_json_tells_masks_shares_scores_and_digests(trained: Path) -> None:
    predictor = Predictor.load(str(trained))
    expected = predictor.masks([SCENE])[0]

    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        told = (await http.post("/v1/masks?view=entropy", content=encoded(SCENE), headers=JSON)).json()
        assert (told["width"], told["height"], told["model_digest"]) == (PX, PX, service.model.digest)
        mask = np.full((PX, PX), 255, np.uint8)
        for entry in told["classes"]:
            assert entry["fraction"] == pytest.approx((expected == entry["id"]).mean(), abs=1e-6)
            if entry["segmentation"]:
                mask[coco.decode(entry["segmentation"]) == 1] = entry["id"]
        np.testing.assert_array_equal(mask, expected)
        scores = (await http.post("/v1/scores", content=encoded(SCENE))).json()["scores"]
        assert scores == told["scores"] and 0 < scores["entropy"] < 1
        import base64

        doubt = decode_mask(base64.b64decode(told["map_png"]), 10**6, "map")
        assert doubt.mean() / 255 == pytest.approx(scores["entropy"], abs=0.05)

    ask(trained, asked)


@pytest.mark.parametrize("view", ["colour", "uncertainty", "entropy"])
def test_pictures_have_the_images_own_size(trained: Path, view: str) -> None:
    image = np.concatenate([SCENE, SCENE[:, :40]], axis=1)

    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        response = await http.post(f"/v1/masks?view={view}", content=encoded(image))
        picture = Image.open(io.BytesIO(response.content))
        assert picture.size == (PX + 40, PX)
        assert picture.mode == ("P" if view == "colour" else "L")

    ask(trained, asked)
    assert view == "colour" or view in MAPS


def test_several_images_are_json_or_a_zip_and_each_may_fail_alone(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        good, bad = ("a.png", encoded(SCENE)), ("bäd.png", b"nothing")
        told = (await http.post("/v1/masks", files=[("image", good), ("image", bad), ("image", good)])).json()["images"]
        assert [("problem" in t) for t in told] == [False, True, False]
        assert told[1]["problem"]["status"] == 415 and told[0]["name"] == "a.png"
        response = await http.post("/v1/masks", files=[("image", good)] * 2, headers={"accept": "application/zip"})
        names = zipfile.ZipFile(io.BytesIO(response.content)).namelist()
        assert names == ["000_a.png", "001_a.png"]
        problem(await http.post("/v1/masks", files=[("image", good), ("image", bad)], headers={"accept": "application/zip"}), 415, "type")
        problem(await http.post("/v1/masks", files=[("image", good)] * 2, headers={"accept": "image/png"}), 406, "accept")

    ask(trained, asked)


def test_large_images_are_tiled_as_in_an_archive(trained: Path) -> None:
    image = np.tile(SCENE, (4, 6, 1))

    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        from dataclasses import replace

        model = service.model.predictor.info.model.model_copy(update={"whole_pixels": 1, "tile_px": 96, "overlap_px": 32})
        service.model.predictor.info = replace(service.model.predictor.info, model=model)
        response = await http.post("/v1/masks", content=encoded(image))
        np.testing.assert_array_equal(decode_mask(response.content, 10**6, "mask"), service.model.predictor.masks([image])[0])
        doubt = decode_mask((await http.post("/v1/masks?view=uncertainty", content=encoded(image))).content, 10**6, "map")
        assert doubt.shape == image.shape[:2] and doubt.max() > 0

    ask(trained, asked)


# --- bad input --------------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A small file whose header promises 30,000 x 30,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.fromarray(SCENE), Image.fromarray(SCENE[::-1].copy())]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "empty"),
        (b"just text", 415, "type"),
        (encoded(SCENE, "GIF"), 415, "type"),
        (encoded(SCENE, "WEBP"), 415, "type"),
        (encoded(SCENE, "BMP"), 415, "type"),
        (encoded(SCENE)[:700], 422, "damaged"),
        (encoded(SCENE, "JPEG")[:300], 422, "damaged"),
        (b"\x89PNG\r\n\x1a\n", 422, "damaged"),
        (bomb(), 413, "pixels"),
        (animated(), 422, "frames"),
        (encoded(Image.fromarray(SCENE), "TIFF", save_all=True, append_images=[Image.fromarray(SCENE)]), 422, "frames"),
        (b"x" * 2_000_000, 413, "bytes"),
    ],
    ids=["empty", "text", "gif", "webp", "bmp", "cut png", "cut jpeg", "signature", "bomb", "animated", "pages", "long"],
)
def test_what_can_not_be_answered_is_a_problem_that_says_what_to_do(trained: Path, body: bytes, status: int, reason: str) -> None:
    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        problem(await http.post("/v1/masks", content=body), status, reason)
        assert (await http.post("/v1/masks", content=encoded(SCENE))).status_code == 200  # it goes on answering

    ask(trained, asked, limits=Limits(max_bytes=1_000_000))


@pytest.mark.parametrize(
    "body",
    [
        encoded(Image.fromarray(SCENE).convert("CMYK"), "JPEG"),
        encoded(np.arange(PX * PX, dtype=np.uint16).reshape(PX, PX)),
        encoded(Image.fromarray(SCENE).convert("RGBA")),
        encoded(
            Image.fromarray(SCENE),
            "JPEG",
            exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00",
        ),
        encoded(SCENE[:1, :1]),
        encoded(Image.fromarray(SCENE).convert("P")),
    ],
    ids=["cmyk", "16 bit", "alpha", "turned", "1 x 1", "palette"],
)
def test_unusual_images_get_masks_of_their_size(trained: Path, body: bytes) -> None:
    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        response = await http.post("/v1/masks", content=body, headers={"content-type": "text/plain"})
        assert response.status_code == 200, response.text
        assert decode_mask(response.content, 10**6, "mask").shape[::-1] == Image.open(io.BytesIO(body)).size

    ask(trained, asked)


def test_requests_that_make_no_sense_are_told_so(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        body = encoded(SCENE)
        form = {"content-type": "multipart/form-data; boundary=x"}
        for content, headers in (
            (b"--x\r\nContent-Disposition: nonsense", form),
            (b"not at all", form),
            (b"", form),
            (b"x", {"content-type": "multipart/form-data"}),
        ):
            problem(await http.post("/v1/masks", content=content, headers=headers), 400, "form")
        for content in (b"{", b"[]", b"{}", b'"x"', b'{"uri": 3}', b"\xff", b"[" * 100_000):
            problem(await http.post("/v1/masks", content=content, headers={"content-type": "application/json"}), 400, "json")
        problem(await http.post("/v1/masks", content=body, headers={"accept": "text/html"}), 406, "accept")
        problem(await http.post("/v1/masks?view=xray", content=body), 400, "parameter")
        problem(await http.post("/v1/masks", content=body, headers={"x-request-timeout-seconds": "soon"}), 400, "header")
        problem(await http.post("/v1/masks", files=[("image", ("a.png", body))] * 17), 413, "images")
        problem(await http.get("/v1/masks"), 405, "http")
        problem(await http.get("/nowhere"), 404, "http")
        problem(await http.get("/static/../app.py"), 404, "http")
        problem(await http.get("/static/app.py"), 404, "path")
        assert (await http.post("/v1/masks", content=body, headers={"x-request-id": "mine-7"})).headers["x-request-id"] == "mine-7"
        assert (await http.post("/v1/masks", content=body, headers={"x-request-id": "a\tb"})).headers["x-request-id"] != "a\tb"

    ask(trained, asked)


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
        problem(await http.post("/v1/masks", content=encoded(SCENE), headers={"x-request-timeout-seconds": "0.2"}), 408, "deadline")
        assert works[0].stop.is_set()
        service.batched = real
        assert (await http.post("/v1/masks", content=encoded(SCENE))).status_code == 200

    ask(trained, asked, limits=Limits(in_flight=1))


def test_a_slow_upload_holds_no_place(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        async def drops() -> object:
            yield b"\x89PNG"
            await asyncio.sleep(30)
            yield b"more"

        problem(await http.post("/v1/masks", content=drops()), 408, "slow")
        assert (await http.post("/v1/masks", content=encoded(SCENE))).status_code == 200

    ask(trained, asked, limits=Limits(in_flight=1, upload_s=0.2))


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


# --- swaps ------------------------------------------------------------------------------------------------------------


def test_a_good_model_takes_over_and_a_bad_one_is_refused(trained: Path, other: Callable[..., Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("model.json", "model.safetensors"):
        (damaged / name).write_bytes((trained / name).read_bytes())
    (damaged / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:-7] + b"1234567")
    reference = tmp_path / "reference"
    reference.mkdir()
    for i in range(3):
        (reference / f"{i}.png").write_bytes(encoded(scene(5, i, PX)[0]))
    better, worse, classes = other("better", 1e-3), other("worse", 2.0), other("classes", label_set=AI4MARS)

    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        async def in_use() -> tuple[str, str | None]:
            told = (await http.get("/v1/model")).json()
            return told["digest"], told["refusal"]

        first, _ = await in_use()
        for bad, why in ((damaged, "damaged|sha256"), (classes, "classes"), (worse, "agreement"), (tmp_path / "none", "no checkpoint")):
            await service.use(ModelSpec(checkpoint=str(bad)))
            digest, refusal = await in_use()
            assert digest == first and refusal, bad
            import re

            assert re.search(why, refusal), refusal
        await service.use(ModelSpec(checkpoint=str(better), digest="0" * 64))
        assert (await in_use())[0] == first
        await service.use(ModelSpec(checkpoint=str(better)))
        second, refusal = await in_use()
        assert second != first and refusal is None
        assert (await http.post("/v1/masks", content=encoded(SCENE))).headers["x-model-digest"] == second
        await service.use(ModelSpec(checkpoint=str(trained), digest=first[:12]))
        assert await in_use() == (first, None)

    ask(trained, asked, gate=Gate(reference=str(reference), agreement=0.8))


def test_a_replica_that_starts_late_holds_the_new_model_against_the_one_before(trained: Path, other: Callable[..., Path]) -> None:
    classes = other("classes", label_set=AI4MARS)

    async def run() -> None:
        made = Settings(checkpoint=str(trained), runtime=EAGER, threads=1)
        service = Service(made, Meters())
        await service.use(ModelSpec(checkpoint=str(classes)))
        assert service.model is not None and service.model.spec.checkpoint == str(trained) and "classes" in str(service.refusal)
        alone = Service(made.model_copy(update={"checkpoint": "/nowhere"}), Meters())
        with pytest.raises(CheckpointError):
            await alone.use(ModelSpec(checkpoint="/nowhere"))

    asyncio.run(run())


def test_answers_that_began_with_the_old_model_end_with_it(trained: Path, other: Callable[..., Path]) -> None:
    better = other("better", 1e-3)

    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        old = service.model.digest
        answers = [asyncio.ensure_future(http.post("/v1/masks", content=encoded(scene(0, i, PX)[0]))) for i in range(12)]
        await asyncio.sleep(0.02)
        await service.use(ModelSpec(checkpoint=str(better)))
        responses = await asyncio.gather(*answers)
        assert {r.status_code for r in responses} == {200}
        assert {r.headers["x-model-digest"] for r in responses} <= {old, service.model.digest}

    ask(trained, asked)


# --- the interface ----------------------------------------------------------------------------------------------------


def test_the_page_and_the_interface_need_nothing_from_elsewhere(trained: Path) -> None:
    async def asked(http: httpx.AsyncClient, _: Service) -> None:
        for path in ("/", "/docs", "/static/page.js", "/static/page.css", "/static/icon.svg", "/examples/0"):
            response = await http.get(path)
            assert response.status_code == 200, path
            assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
            if not path.startswith("/examples"):
                assert "http://" not in response.text.replace("http://www.w3.org", "") and "https://" not in response.text, path
        schema = (await http.get("/openapi.json")).json()
        assert set(schema["paths"]) == {"/v1/masks", "/v1/scores", "/v1/model", "/v1/healthz", "/v1/readyz"}
        assert "429" in schema["paths"]["/v1/masks"]["post"]["responses"]
        text = json.dumps(schema)
        assert all(f'"{name}"' in text for name in ("Problem", "token"))

    ask(trained, asked, client="203.0.113.9", tokens=TOKEN)
