"""What tests of the endpoint share: requests to one that runs without Ray."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from raysal.config import RuntimeConfig
from raysal.datasets.synthetic import scene
from raysal.serving.app import make_app
from raysal.serving.meters import Meters
from raysal.serving.service import Service
from raysal.serving.settings import Settings
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


def ask(
    checkpoint: Path,
    asked: Asked,
    client: str = "127.0.0.1",
    tokens: str = "",
    host: str = "127.0.0.1",
    meters: Meters | None = None,
    **settings: object,
) -> None:
    """Runs some requests against an endpoint of its own."""

    async def run() -> None:
        made = Settings(checkpoint=str(checkpoint), runtime=EAGER, threads=1, **settings)
        service = Service(made, meters or Meters())
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
