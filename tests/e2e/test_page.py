"""The page in a browser, with an endpoint that is made up: what it does where answers are late or images are turned."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from importlib.resources import files
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from raysal.datasets.synthetic import scene
from raysal.images.masks import encode_mask
from raysal.serving.app import ASSETS

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 96, 64
IMAGE = scene(0, 1, WIDTH)[0][:HEIGHT]
PAGE = files("raysal.serving") / "page"


def encoded(kind: str, orientation: int | None = None) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[274] = orientation
    Image.fromarray(IMAGE).save(file, kind, **({"exif": exif} if orientation else {}), **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


class Answers:
    """Answers the page; PNG masks when they are let go."""

    def __init__(self) -> None:
        self.late: list[Any] = []
        self.hold = False

    def __call__(self, route: Any) -> None:
        path, request = urlsplit(route.request.url).path, route.request
        if path == "/":
            route.fulfill(body=(PAGE / "index.html").read_text(), content_type="text/html")
        elif path.startswith("/static/"):
            name = path.rpartition("/")[2]
            route.fulfill(body=(PAGE / name).read_bytes(), content_type=ASSETS[name])
        elif path == "/v1/model":
            route.fulfill(json={"label_set": "S5Mars", "encoder": "resnet18", "digest": "0" * 64})
        elif request.headers["accept"] == "image/png":
            if self.hold:
                self.late.append(route)
            else:
                route.fulfill(body=encode_mask(np.zeros((HEIGHT, WIDTH), np.uint8)), content_type="image/png")
        else:
            route.fulfill(json=self.told(unquote(request.headers["x-image-name"])))

    def told(self, name: str) -> dict:
        doubt = base64.b64encode(encode_mask(np.zeros((HEIGHT, WIDTH), np.uint8))).decode()
        empty = [{"id": 0, "name": "sky", "color": [1, 2, 3], "fraction": 0.0, "segmentation": None}]
        numbers = {"confidence": 0.5, "abstained": 1.0, "scores": {"entropy": 0.1, "uncertainty": 0.1}}
        return {"width": WIDTH, "height": HEIGHT, "classes": empty, "model_digest": "0" * 64, "map_png": doubt, "name": name} | numbers

    def let_go(self) -> None:
        for value, route in enumerate(self.late):
            route.fulfill(body=encode_mask(np.full((HEIGHT, WIDTH), value, np.uint8)), content_type="image/png")


@pytest.fixture
def shown(browser: Any) -> Iterator[tuple[Any, Answers]]:
    context, answers, wrong = browser.new_context(viewport={"width": 1000, "height": 700}), Answers(), list[str]()
    page = context.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.route("**/*", answers)
    page.goto("http://endpoint.test/")
    yield page, answers
    assert wrong == []
    context.close()


def send(page: Any, *images: tuple[str, bytes]) -> None:
    page.set_input_files("#files", [{"name": name, "mimeType": "image/jpeg", "buffer": data} for name, data in images])
    for name, _ in images:
        page.locator("#list button:not([disabled])", has_text=name).wait_for()


def pixels(page: Any) -> np.ndarray:
    flat = page.evaluate(f"[...document.getElementById('canvas').getContext('2d').getImageData(0, 0, {WIDTH}, {HEIGHT}).data]")
    return np.asarray(flat, np.uint8).reshape(HEIGHT, WIDTH, 4)[..., :3]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_is_drawn_as_it_is_stored_however_the_camera_was_held(shown: tuple[Any, Answers], kind: str, orientation: int) -> None:
    page, _ = shown
    data = encoded(kind, orientation)
    assert Image.open(io.BytesIO(data)).getexif()[274] == orientation
    send(page, ("turned.jpg", data))
    page.select_option("#view", "image")
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
    assert np.abs(pixels(page) - stored).mean() < 2  # browsers round JPEG otherwise
    assert np.abs(stored[::-1, ::-1] - stored).mean() > 10


def test_a_late_mask_is_not_offered_under_another_images_name(shown: tuple[Any, Answers], tmp_path: Any) -> None:
    page, answers = shown
    answers.hold = True
    data = encoded("JPEG")
    send(page, ("first.jpg", data))
    send(page, ("second.jpg", data + b"2"))
    page.locator("#list button", has_text="second.jpg").click()
    assert page.locator("#png").get_attribute("href") is None
    page.wait_for_function("document.getElementById('name').textContent === 'second.jpg'")
    while len(answers.late) < 2:
        page.wait_for_timeout(50)
    answers.late.reverse()  # the first image's mask comes last
    answers.let_go()
    page.wait_for_selector("#png[href]")
    page.wait_for_timeout(300)
    assert page.get_attribute("#png", "download") == "second_mask.png"
    with page.expect_download() as download:
        page.click("#png")
    download.value.save_as(tmp_path / "mask.png")
    assert np.asarray(Image.open(tmp_path / "mask.png")).max() == 0


def test_the_keyboard_stays_where_it_was_while_answers_come(shown: tuple[Any, Answers]) -> None:
    page, _ = shown
    send(page, ("first.jpg", encoded("JPEG")), ("second.jpg", encoded("JPEG") + b"2"))
    page.focus("#list li:nth-child(2) button")
    page.keyboard.press("Enter")
    assert page.inner_text("#name") == page.inner_text("#list li:nth-child(2) button")
    send(page, ("third.jpg", encoded("JPEG") + b"3"))
    assert page.evaluate("document.activeElement.textContent") == page.inner_text("#list li:nth-child(2) button")
    assert page.locator("#list [aria-current=true]").count() == 1
