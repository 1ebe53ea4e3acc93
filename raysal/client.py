"""Asks an endpoint for masks, from Python: one image, or a folder of them with many requests under way."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx
import numpy as np

from raysal.archive.fetch import PICTURES
from raysal.archive.uris import write_bytes
from raysal.errors import InputError, RaysalError
from raysal.images.masks import decode_mask, encode_mask

View = Literal["index", "colour", "uncertainty", "entropy"]

Progress = Callable[[int, int, dict[str, int]], None]

AGAIN = (408, 429, 502, 503, 504)
"""Statuses after which another try may do: nothing that an endpoint does changes anything, so every request may be sent again."""

LONGEST_WAIT_S = 30.0


class Refused(RaysalError):
    """The endpoint does not answer this request, however often it is asked.

    Attributes:
        status: Of the answer.
        reason: A short word, the same for the same cause.
    """

    def __init__(self, status: int, reason: str, title: str) -> None:
        super().__init__(title)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of `raysal serve`.

    Args:
        url: For example http://127.0.0.1:8000.
        token: Bearer token, where it wants one.
        tries: Of a request, until it counts as failed.
        timeout_s: Of one try.
    """

    url: str
    token: str | None = None
    tries: int = 6
    timeout_s: float = 90.0

    def mask(self, image: bytes | str | Path, name: str | None = None) -> np.ndarray:
        """uint8 [H, W] class ids of an image, 255 = abstained.

        Args:
            image: Its bytes, or the path of its file.
            name: What messages call it.

        Raises:
            Refused: The image or the token is no good.
            RaysalError: No answer after all tries.
        """
        return _mask(self._post("v1/masks", image, name, "image/png").content, name or "mask")

    def picture(self, image: bytes | str | Path, view: View, name: str | None = None) -> bytes:
        """A PNG of the image's own size. Arguments and errors as in `mask`."""
        return self._post(f"v1/masks?view={view}", image, name, "image/png").content

    def describe(self, image: bytes | str | Path, name: str | None = None) -> dict[str, Any]:
        """Masks as COCO RLE, shares, confidence, scores, digests. Arguments and errors as in `mask`."""
        found: dict[str, Any] = self._post("v1/masks", image, name, "application/json").json()
        return found

    def scores(self, image: bytes | str | Path, name: str | None = None) -> dict[str, Any]:
        """What an image is worth asking about. Arguments and errors as in `mask`."""
        found: dict[str, Any] = self._post("v1/scores", image, name, "application/json").json()
        return found

    def model(self) -> dict[str, Any]:
        """The model in use."""
        with httpx.Client(timeout=self.timeout_s) as client:
            found: dict[str, Any] = self._tried(lambda: client.get(f"{self._base}v1/model", headers=self._headers(None, "*/*"))).json()
            return found

    async def masks(
        self, files: Iterable[Path], at_once: int = 8, on_done: Callable[[Path], None] = lambda _: None
    ) -> AsyncIterator[tuple[Path, np.ndarray | RaysalError]]:
        """Masks of many files, as they come: each file with its mask, or with why there is none.

        Args:
            files: Paths; read one by one, so that any number of them takes little memory.
            at_once: Requests under way.
            on_done: Called after each.
        """
        waiting: set[asyncio.Task[tuple[Path, np.ndarray | RaysalError]]] = set()
        todo = iter(files)
        async with httpx.AsyncClient(timeout=self.timeout_s) as client:
            try:
                while True:
                    while len(waiting) < at_once and (file := next(todo, None)) is not None:
                        waiting.add(asyncio.ensure_future(self._one(client, file)))
                    if not waiting:
                        return
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        found = task.result()
                        on_done(found[0])
                        yield found
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    def save_masks(
        self,
        folder: str | Path,
        out: str | Path,
        at_once: int = 8,
        on_progress: Callable[[int, int, dict[str, int]], None] = lambda *_: None,
    ) -> dict[str, str]:
        """Masks of all images below a folder, written under their paths as PNG; those that are there already are not asked for again.

        Args:
            folder: Searched for JPEG, PNG and TIFF files.
            out: Folder of the masks: ``a/b.jpg`` becomes ``a/b.png``.
            at_once: Requests under way.
            on_progress: Called as on_progress(done, total, {"ok": .., "failed": ..}) after each image.

        Returns:
            Why there is no mask, by the paths of the images that have none.

        Raises:
            InputError: No images, or two that would share a mask's name; or masks can't be written.
        """
        root, target = Path(folder), Path(out)
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
        named = {file: (target / file.relative_to(root)).with_suffix(".png") for file in files}
        if not files:
            raise InputError(f"{folder}: holds no image ({', '.join(PICTURES)})")
        if twice := [file for file, count in Counter(named.values()).items() if count > 1]:
            raise InputError(f"{folder}: {len(twice)} masks would have the name of another, for example {twice[0].name}; rename the images")
        todo, failed = [file for file in files if not named[file].exists()], dict[str, str]()

        async def run() -> None:
            done = len(files) - len(todo)
            async for file, found in self.masks(todo, at_once):
                if isinstance(found, RaysalError):
                    failed[str(file)] = str(found)
                else:
                    write_bytes(str(named[file]), encode_mask(found))
                done += 1
                on_progress(done, len(files), {"ok": done - len(failed), "failed": len(failed)})

        asyncio.run(run())
        return failed

    async def _one(self, client: httpx.AsyncClient, file: Path) -> tuple[Path, np.ndarray | RaysalError]:
        try:
            data = await asyncio.to_thread(file.read_bytes)
            last: httpx.Response | Exception | None = None
            for attempt in range(self.tries):
                if attempt:
                    await asyncio.sleep(_pause(attempt, last))
                try:
                    last = await client.post(f"{self._base}v1/masks", content=data, headers=self._headers(file.name, "image/png"))
                except httpx.TransportError as error:
                    last = error
                if isinstance(last, httpx.Response) and not _may_pass(last):
                    return file, _mask(_checked(last).content, file.name)
            raise self._given_up(last)
        except OSError as error:
            return file, InputError(f"{file}: can't be read ({error.strerror or error})")
        except RaysalError as error:
            return file, error

    @property
    def _base(self) -> str:
        return self.url.rstrip("/") + "/"

    def _headers(self, name: str | None, accept: str) -> dict[str, str]:
        headers = {"Accept": accept, "Content-Type": "application/octet-stream"}
        if name:
            headers["X-Image-Name"] = quote(name)
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers

    def _post(self, path: str, image: bytes | str | Path, name: str | None, accept: str) -> httpx.Response:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        headers = self._headers(name or (None if isinstance(image, bytes) else Path(image).name), accept)
        with httpx.Client(timeout=self.timeout_s) as client:
            return self._tried(lambda: client.post(self._base + path, content=data, headers=headers))

    def _tried(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        last: httpx.Response | Exception | None = None
        for attempt in range(self.tries):
            if attempt:
                time.sleep(_pause(attempt, last))
            try:
                last = send()
            except httpx.TransportError as error:
                last = error
            if isinstance(last, httpx.Response) and not _may_pass(last):
                return _checked(last)
        raise self._given_up(last)

    def _given_up(self, last: httpx.Response | Exception | None) -> RaysalError:
        said = _title(last) if isinstance(last, httpx.Response) else f"{type(last).__name__}: {last}"
        return RaysalError(f"{self.url}: no answer after {self.tries} tries ({said}); is the endpoint up? curl {self._base}v1/readyz")


def _may_pass(response: httpx.Response) -> bool:
    """Whether another try may do.

    A 500 without a problem is not the endpoint's but its proxy's: the replica died over the request. An image that took longer than its
    deadline would do so again.
    """
    problem = _problem(response)
    again = response.status_code in AGAIN or (response.status_code == 500 and not problem)
    return again and (response.status_code, problem.get("reason")) != (408, "deadline")


def _pause(attempt: int, last: httpx.Response | Exception | None) -> float:
    """Seconds until the next try: what the endpoint says, else twice as long each time, never in step with other clients."""
    asked = last.headers.get("Retry-After", "") if isinstance(last, httpx.Response) else ""
    least = float(asked) if asked.isdigit() else 0.25 * 2**attempt
    return min(LONGEST_WAIT_S, least) * random.uniform(1.0, 1.5)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    reason = _problem(response).get("reason", "http")
    raise Refused(response.status_code, str(reason), _title(response))


def _title(response: httpx.Response) -> str:
    return str(_problem(response).get("title", f"the endpoint answered {response.status_code}"))


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _mask(data: bytes, name: str) -> np.ndarray:
    return decode_mask(data, 2**40, name)
