"""What the endpoint answers, and what it refuses and how."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from pycocotools import mask as coco

from raysal.datasets.synthetic import scene
from raysal.images.masks import decode_mask
from raysal.model.runtime import Predictor
from raysal.serving.intake import Upload, look
from raysal.serving.problems import Problem
from raysal.serving.service import Service
from raysal.serving.settings import Limits
from tests.trained import PX
from tests.unit.endpoint import JSON, SCENE, TOKEN, ask, encoded, problem

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
        doubt = decode_mask(base64.b64decode(told["map_png"]), 10**6, "map")
        assert doubt.mean() / 255 == pytest.approx(scores["entropy"], abs=0.05)

    ask(trained, asked)


def test_all_that_is_told_of_an_image_comes_from_one_pass_through_the_network(trained: Path) -> None:
    """Large ones too: a pass a tile, whatever is asked, and whoever asks for another view next."""
    large = scene(5, 0, 160)[0]

    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        recent, passes = service.model.predictor._engine, []
        engine = recent._engine
        recent._engine = lambda *given: passes.append(1) or engine(*given)
        model = service.model.predictor.info.model.model_copy(update={"whole_pixels": PX * PX, "tile_px": 96, "overlap_px": 32})
        service.model.predictor.info = replace(service.model.predictor.info, model=model)
        tiles = len([*service.model.predictor.grid(large.shape[:2]).tiles()])
        for image, expected in ((SCENE, 1), (large, 1 + tiles)):
            for view in ("index", "entropy", "uncertainty"):
                assert (await http.post(f"/v1/masks?view={view}", content=encoded(image), headers=JSON)).status_code == 200
                assert (await http.post(f"/v1/masks?view={view}", content=encoded(image))).status_code == 200
            assert len(passes) == expected

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


def test_a_look_at_an_image_finds_its_size_and_walks_over_no_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiffImageFile, "n_frames", property(lambda _: pytest.fail("walked over all frames")))
    broken = bytearray(encoded(SCENE, "TIFF"))
    at = int.from_bytes(broken[4:8], "little")
    next_at = at + 2 + 12 * int.from_bytes(broken[at : at + 2], "little")
    broken[next_at : next_at + 4] = (2**31).to_bytes(4, "little")
    for data in (animated(), encoded(Image.fromarray(SCENE), "TIFF", save_all=True, append_images=[Image.fromarray(SCENE)]), bytes(broken)):
        with pytest.raises(Problem, match="several frames"):
            look(Upload("a", data), 10**9)
    assert look(Upload("a", encoded(SCENE, "TIFF")), 10**9) == PX * PX
    assert look(Upload("a", bomb()), 10**6) == 10**6


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
        problem(await http.post("/v1/masks", content=body, headers={"x-deadline-seconds": "soon"}), 400, "header")
        problem(await http.post("/v1/masks", files=[("image", ("a.png", body))] * 17), 413, "images")
        problem(await http.get("/v1/masks"), 405, "http")
        problem(await http.get("/nowhere"), 404, "http")
        problem(await http.get("/static/../app.py"), 404, "http")
        problem(await http.get("/static/app.py"), 404, "path")
        assert (await http.post("/v1/masks", content=body, headers={"x-request-id": "mine-7"})).headers["x-request-id"] == "mine-7"
        assert (await http.post("/v1/masks", content=body, headers={"x-request-id": "a\tb"})).headers["x-request-id"] != "a\tb"

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
