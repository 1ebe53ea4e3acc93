"""The endpoint as a user runs it: a process of its own, real HTTP, models swapped and replicas killed while it answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysal.client import Endpoint, Refused
from raysal.config import ModelConfig, build
from raysal.datasets.synthetic import scene
from raysal.images.masks import decode_mask
from raysal.labels import AI4MARS, S5MARS, LabelSet
from raysal.model.checkpoint import ModelInfo, digest_at, load, save
from raysal.model.network import TwoBranch
from raysal.stream.archive import open_manifest
from raysal.stream.label import label_pool
from tests.helpers import processes, run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = ModelConfig(arch="Unet", encoder="tu-mobilenetv3_small_050")
SIDE = 96
REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 400


def successor(old: Path, folder: Path) -> Path:
    """A checkpoint that says nearly what another one says."""
    found = load(str(old))
    next(found.model.parameters()).data += 1e-4
    save(str(folder), found.model, found.info)
    return folder


def checkpoint(folder: Path, seed: int, label_set: LabelSet = S5MARS) -> Path:
    save(str(folder), TwoBranch(MODEL, label_set.n_classes, seed), ModelInfo(label_set, MODEL, 1.0, SIDE))
    return folder


@dataclass
class Running:
    """An endpoint, and where its things are."""

    url: str
    dashboard: str
    process: subprocess.Popen
    root: Path
    images: list[Path] = field(default_factory=list)

    def promote(self, checkpoint: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "raysal", "serve", "promote", str(checkpoint), "--dashboard", self.dashboard]
        return subprocess.run(command, capture_output=True, text=True, timeout=START_S, env=environment())

    def digests(self, answers: int = 12) -> set[str]:
        return {httpx.get(f"{self.url}/v1/model", timeout=60).json()["digest"] for _ in range(answers)}


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}


@contextmanager
def serving(root: Path, *options: str) -> Iterator[Running]:
    """An endpoint of its own, whose images may be named by URI."""
    images = root / "images"
    images.mkdir()
    for i in range(6):
        Image.fromarray(scene(0, i, SIDE)[0]).save(images / f"{i}.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "raysal", "serve", str(checkpoint(root / "first", 0))]
    command += ["--port", str(port), "--root", str(images), "--json", *options]
    with open(root / "said", "w") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment())
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline() or "null")
        assert told, (root / "said").read_text()[-3000:]
        yield Running(told["url"], told["dashboard"], process, root, sorted(images.iterdir()))
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("serve"), "--replicas", "2") as up:
        yield up


class Load:
    """Clients that ask without a pause until they are told to stop."""

    def __init__(self, running: Running, tries: int, clients: int = 3) -> None:
        self.running, self.tries = running, tries
        self.failed: list[str] = []
        self.answers: list[str] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(k,)) for k in range(clients)]

    def _ask(self, k: int) -> None:
        endpoint = Endpoint(self.running.url, tries=self.tries)
        while not self._end.is_set():
            try:
                told = endpoint.describe(self.running.images[k % len(self.running.images)])
                self.answers.append(told["model_digest"])
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


def test_a_mask_is_that_of_raysal_label_to_the_byte_by_every_way_in(running: Running, tmp_path: Path) -> None:
    manifest = open_manifest(str(running.root / "images"))
    label_pool(manifest, str(running.root / "first"), str(tmp_path / "labels"), build({"run": str(tmp_path)}))
    labels = pq.read_table([str(f) for f in (tmp_path / "labels").glob("part-*.parquet")]).to_pylist()
    expected = {Path(row["uri"]).name: row["mask_png"] for row in labels}
    endpoint = Endpoint(running.url)
    for file in running.images:
        assert endpoint.picture(file, "index") == expected[file.name]
    by_uri = httpx.post(f"{running.url}/v1/masks", json={"uri": str(running.images[2])}, timeout=60)
    assert by_uri.content == expected[running.images[2].name]

    async def folder() -> dict[str, np.ndarray]:
        return {file.name: mask async for file, mask in endpoint.masks(running.images, at_once=4)}  # type: ignore[misc]

    found = asyncio.run(folder())
    assert set(found) == set(expected)
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, decode_mask(expected[name], 10**6, name))


def test_a_folder_is_asked_for_by_one_command_which_goes_on_where_it_was(running: Running, tmp_path: Path) -> None:
    inbox, masks = tmp_path / "inbox", tmp_path / "masks"
    (inbox / "sol 7").mkdir(parents=True)
    (inbox / "broken.jpg").write_bytes(b"not an image")
    for file, place in zip(running.images, ("a.png", "sol 7/b.png"), strict=False):
        shutil.copy(file, inbox / place)

    def ask() -> subprocess.CompletedProcess:
        return run("serve", "ask", str(inbox), "--out", str(masks), "--url", running.url, "--json")

    asked = ask()
    assert asked.returncode == 1 and list(json.loads(asked.stdout)["failed"]) == [str(inbox / "broken.jpg")], asked.stderr
    assert "neither JPEG" in asked.stderr
    for file, place in zip(running.images, ("a.png", "sol 7/b.png"), strict=False):
        np.testing.assert_array_equal(decode_mask((masks / place).read_bytes(), 10**6, place), Endpoint(running.url).mask(file))
    (inbox / "broken.jpg").unlink()
    kept = (masks / "a.png").stat().st_mtime_ns
    (masks / "sol 7/b.png").unlink()
    again = ask()
    assert again.returncode == 0 and (masks / "sol 7/b.png").exists() and (masks / "a.png").stat().st_mtime_ns == kept
    shutil.copy(running.images[0], inbox / "a.JPG")
    twice = ask()
    assert twice.returncode == 2 and "would have the name of another" in twice.stderr


def test_the_client_says_why_an_image_is_refused_and_does_not_ask_again(running: Running, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(b"not an image")
    with pytest.raises(Refused, match="neither JPEG") as refused:
        Endpoint(running.url).mask(tmp_path / "text.png")
    assert (refused.value.status, refused.value.reason) == (415, "type")


def test_models_are_swapped_while_it_answers_and_bad_ones_are_refused(running: Running) -> None:
    first, second = digest_at(str(running.root / "first")), digest_at(str(successor(running.root / "first", running.root / "second")))
    bad = running.promote(checkpoint(running.root / "classes", 1, AI4MARS))
    assert bad.returncode == 2 and "classes" in bad.stderr, bad.stderr
    assert running.digests() == {first}
    with Load(running, tries=1) as load:
        time.sleep(1)
        good = running.promote(running.root / "second")
        assert good.returncode == 0, good.stderr
        time.sleep(1)
    assert load.failed == [] and set(load.answers) == {first, second}
    assert running.digests() == {second}


def test_a_replica_that_is_killed_costs_a_retrying_client_nothing(running: Running) -> None:
    def replicas() -> list[psutil.Process]:
        return processes("ServeReplica:raysal", running.process.pid)

    before = replicas()
    assert len(before) == 2
    with Load(running, tries=8) as load:
        time.sleep(1)
        before[0].send_signal(signal.SIGKILL)
        asked = len(load.answers)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and (len(replicas()) < 2 or len(load.answers) < asked + 20):
            time.sleep(0.5)
    assert load.failed == [] and len(load.answers) >= asked + 20
    assert len(replicas()) == 2


def test_it_keeps_to_its_own_description(running: Running) -> None:
    """Requests that schemathesis makes up from /openapi.json, good and bad ones: no failure, no status that is not described."""
    schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis; pip install 'raysal[test]'")
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks
    from schemathesis.generation import GenerationMode

    held = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
    held += [checks.response_schema_conformance, checks.unsupported_method]
    asked: Counter[tuple[str, int]] = Counter()
    operations = [result.ok() for result in schemathesis.openapi.from_url(f"{running.url}/openapi.json").get_all_operations()]
    for operation in operations:
        for mode in GenerationMode:
            if mode == GenerationMode.NEGATIVE and operation.method.upper() == "GET":
                continue  # it takes nothing that could be wrong

            def ask(case: Any) -> None:
                asked[case.operation.path, case.call_and_validate(checks=held, timeout=60).status_code] += 1

            made = given(case=operation.as_strategy(generation_mode=mode))(ask)
            settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))(made)()
    assert {path for path, _ in asked} == {operation.path for operation in operations}
    assert sum(n for (path, _), n in asked.items() if path == "/v1/masks") >= 25, asked


def test_each_number_on_the_dashboard_is_measured(running: Running) -> None:
    dashboard = json.loads((REPOSITORY / "deploy/grafana/endpoint.json").read_text())
    shown = {name for panel in dashboard["panels"] for t in panel["targets"] for name in re.findall(r"ray_raysal_\w+", t["expr"])}
    assert len(shown) >= 8
    token = (Path.home() / ".ray/auth_token").read_text().strip()
    Endpoint(running.url).mask(running.images[0])
    assert httpx.post(f"{running.url}/v1/masks", content=b"not an image", timeout=60).status_code == 415
    there: set[str] = set()
    deadline = time.monotonic() + START_S
    while not shown <= there and time.monotonic() < deadline:  # Ray gathers them every few seconds
        told = httpx.get(f"{running.dashboard}/api/prometheus/sd", headers={"Authorization": f"Bearer {token}"}, timeout=60).json()
        for target in {t for group in told for t in group["targets"]}:
            try:
                there |= set(re.findall(r"^(ray_raysal_\w+)", httpx.get(f"http://{target}/metrics", timeout=60).text, re.MULTILINE))
            except httpx.TransportError:  # Ray names its autoscaler's, too, where there is none
                continue
        time.sleep(1)
    assert shown <= there, shown - there


def test_a_request_is_one_line_of_json_in_the_log_and_no_secret_is(running: Running) -> None:
    request_id, secret = "test-of-the-log-1", "a-token-that-nobody-may-read"
    headers = {"X-Request-Id": request_id, "Authorization": f"Bearer {secret}"}
    answer = httpx.post(f"{running.url}/v1/masks", content=running.images[0].read_bytes(), headers=headers, timeout=60)
    assert answer.status_code == 200 and answer.headers["x-request-id"] == request_id
    files = {Path(f.path) for p in processes("ServeReplica:raysal", running.process.pid) for f in p.open_files() if f.path.endswith(".log")}
    lines = [line for file in files if "serve" in file.parts for line in file.read_text().splitlines()]
    mine = [json.loads(line) for line in lines if request_id in line]
    assert [(m["request_id"], m["path"], m["status"]) for m in mine] == [(request_id, "/v1/masks", 200)], mine
    assert mine[0]["seconds"] > 0
    assert not any(secret in file.read_text(errors="replace") for file in files)


@pytest.mark.data
def test_panoramas_have_one_mask_by_curl_the_client_the_page_and_raysal_label(
    running: Running, browser: Any, shared: Path, tmp_path: Path
) -> None:
    images = shared / "data/mars/panoramas/images"
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    [now] = running.digests()
    model = next(folder for folder in (running.root / "first", running.root / "second") if digest_at(str(folder)) == now)
    label_pool(open_manifest(str(images)), str(model), str(tmp_path / "labels"), build({"run": str(tmp_path)}))
    labels = pq.read_table([str(f) for f in (tmp_path / "labels").glob("part-*.parquet")]).to_pylist()
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.goto(running.url)
    for row in labels:
        file, by_curl = images / Path(row["uri"]).name, tmp_path / f"{Path(row['uri']).stem}.png"
        subprocess.run(["curl", "-sSf", "--data-binary", f"@{file}", f"{running.url}/v1/masks", "-o", str(by_curl)], check=True)
        assert by_curl.read_bytes() == row["mask_png"], file.name
        mask_HW = decode_mask(row["mask_png"], 10**8, file.name)
        assert mask_HW.shape == Image.open(file).size[::-1]
        np.testing.assert_array_equal(Endpoint(running.url).mask(file), mask_HW)
        page.set_input_files("#files", str(file))
        button = page.locator("#list button:not([disabled])", has_text=file.name)
        button.wait_for(timeout=120_000)
        button.click()
        page.locator(f"#png[download^='{file.stem}']").wait_for(timeout=120_000)
        with page.expect_download() as download:
            page.click("#png")
        download.value.save_as(by_curl)
        assert by_curl.read_bytes() == row["mask_png"], file.name
    assert len(labels) == 3


@pytest.mark.parametrize("device", ["desk", "phone"])
def test_the_page_shows_the_endpoints_own_masks_and_asks_nobody_else(running: Running, browser: Any, device: str, tmp_path: Path) -> None:
    size = {"width": 1280, "height": 800} if device == "desk" else {"width": 390, "height": 844}
    context = browser.new_context(viewport=size, has_touch=device == "phone", color_scheme="dark" if device == "phone" else "light")
    page, asked, wrong = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(running.url)
    page.set_input_files("#files", [str(f) for f in running.images[:2]])
    page.wait_for_selector("#legend li", timeout=120_000)
    page.locator("#list button:not([disabled])").nth(1).wait_for(timeout=120_000)
    page.wait_for_selector("#png[href]", timeout=120_000)
    shown = page.inner_text("#name")
    told = Endpoint(running.url).describe(next(f for f in running.images if f.name == shown))
    largest = max(told["classes"], key=lambda c: c["fraction"])
    assert page.inner_text("#legend li:first-child span:first-of-type") == largest["name"]
    with page.expect_download() as download:
        page.click("#png")
    download.value.save_as(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes() == Endpoint(running.url).picture(running.root / "images" / shown, "index")

    def pixels() -> list[int]:
        return page.evaluate("[...document.getElementById('canvas').getContext('2d').getImageData(0, 0, 96, 96).data]")

    masked = pixels()
    page.uncheck("#legend li:first-child input")
    without = pixels()
    page.focus("#stage")
    page.keyboard.press("m")
    alone = pixels()
    page.select_option("#view", "uncertainty")
    assert masked != without != alone != pixels()
    stored = np.asarray(Image.open(running.root / "images" / shown).convert("RGBA")).ravel()
    np.testing.assert_array_equal(alone, stored)
    page.keyboard.press("+")
    page.click("[data-example='0']")
    page.locator("#list button:not([disabled])").nth(2).wait_for(timeout=120_000)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=tmp_path / f"{device}.png", full_page=True)
    assert wrong == []
    assert {u.split("/")[2] for u in asked if not u.startswith(("blob:", "data:"))} == {running.url.split("/")[2]}
    context.close()


def test_the_last_one_what_was_accepted_is_answered_before_it_ends(running: Running, tmp_path: Path) -> None:
    """Ends the endpoint of this file."""
    image_HWC = np.tile(scene(0, 1, SIDE)[0], (6, 6, 1))
    files = [tmp_path / f"{k}.png" for k in range(8)]
    for k, file in enumerate(files):
        Image.fromarray(np.roll(image_HWC, k, axis=1)).save(file)
    with ThreadPoolExecutor(len(files)) as clients:
        began = time.monotonic()
        Endpoint(running.url).mask(files[0])
        alone_s = time.monotonic() - began
        asked = [clients.submit(Endpoint(running.url, tries=1).mask, file) for file in files]
        time.sleep(min(1.0, alone_s))
        under_way = sum(not answer.done() for answer in asked)
        running.process.terminate()  # Ctrl-C does the same, but a shell in the background lets none through
        masks = [answer.result() for answer in asked]
    assert under_way and all(mask_HW.shape == image_HWC.shape[:2] for mask_HW in masks)
    assert running.process.wait(180) == 0
