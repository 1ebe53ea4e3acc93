"""What the client asks again for, and what it does not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest

from raysal import client
from raysal.client import Endpoint, Refused
from raysal.errors import RaysalError
from raysal.images.masks import encode_mask
from raysal.serving.problems import Problem

MASK = np.zeros((2, 3), np.uint8)
GOOD = httpx.Response(200, content=encode_mask(MASK))


def problem(status: int, reason: str) -> httpx.Response:
    return httpx.Response(status, json=Problem(status, "what to do", reason).body("id"))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[httpx.Response | Exception]:
    """What an endpoint answers, one after the other; the last again and again."""
    left: list[httpx.Response | Exception] = []
    whole = {True: httpx.AsyncClient, False: httpx.Client}

    def handle(_: httpx.Request) -> httpx.Response:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    monkeypatch.setattr(httpx, "Client", lambda **more: whole[False](transport=httpx.MockTransport(handle), **more))
    monkeypatch.setattr(httpx, "AsyncClient", lambda **more: whole[True](transport=httpx.MockTransport(handle), **more))
    monkeypatch.setattr(client, "_pause", lambda *_: 0.0)
    return left


@pytest.mark.parametrize(
    "first",
    [
        problem(429, "busy"),
        problem(503, "loading"),
        problem(408, "slow"),
        httpx.Response(500, text="a replica died"),
        httpx.ReadError("cut"),
    ],
    ids=["busy", "loading", "slow upload", "died", "cut"],
)
def test_what_may_pass_is_asked_for_again(answers: list, first: httpx.Response | Exception) -> None:
    answers += [first, first, GOOD]
    np.testing.assert_array_equal(Endpoint("http://here").mask(b"image"), MASK)
    answers[:] = [first, problem(422, "damaged")]
    with pytest.raises(Refused, match="what to do"):
        Endpoint("http://here").mask(b"image")
    answers[:] = [first]
    with pytest.raises(RaysalError, match="no answer after 6 tries"):
        Endpoint("http://here").mask(b"image")


def test_an_image_that_takes_longer_than_its_deadline_is_not_asked_for_again(answers: list, tmp_path: Path) -> None:
    answers += [problem(408, "deadline"), GOOD]
    with pytest.raises(Refused) as refused:
        Endpoint("http://here").mask(b"image")
    assert (refused.value.status, refused.value.reason) == (408, "deadline")
    answers[:] = [problem(408, "deadline"), GOOD]
    (tmp_path / "a.png").write_bytes(b"image")

    async def folder() -> list[object]:
        return [found async for _, found in Endpoint("http://here").masks([tmp_path / "a.png"])]

    [found] = asyncio.run(folder())
    assert isinstance(found, Refused) and found.reason == "deadline"
