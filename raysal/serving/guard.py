"""What stands before every request: its id, a token, a place, a body of bounded size and time, a deadline; and behind it: a log line."""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

from raysal.serving.meters import Meters
from raysal.serving.problems import Problem
from raysal.serving.settings import Limits
from raysal.serving.tokens import Tokens

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

log = logging.getLogger("ray.serve")

REQUEST_ID = re.compile(r"[!-~]{1,128}")
DEADLINE = "x-deadline-seconds"
"""Not Serve's own x-request-timeout-seconds: its proxy answers that one itself, in plain text."""
GONE = 499
"""What logs and metrics call the status of a client that did not wait for its answer."""

SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that bring no body: they take no place."""


class Route(NamedTuple):
    """What a request is for.

    Attributes:
        path: As the app names it, "other" where it has no such page: not what the client wrote, which metrics would grow with.
        answered: Whether the app answers that method there.
        open: Whether it is answered without a token.
    """

    path: str
    answered: bool
    open: bool


class Guard:
    """An ASGI app around another.

    Args:
        app: What answers.
        tokens: Who may ask.
        limits: What a request may take.
        routed: What a request, by its ASGI scope, is for.
        proxied: Whether all clients seem to be on this machine, because a proxy there takes the connections.
        digest: Of the model in use, which every answer to those who may ask names.
        meters: Count what happened.
        echoed: Whether the server in front puts the request's id on every answer itself, as Ray Serve does.
    """

    def __init__(
        self,
        app: App,
        tokens: Tokens,
        limits: Limits,
        routed: Callable[[Any], Route],
        proxied: bool,
        digest: Callable[[], str],
        meters: Meters,
        echoed: bool = False,
    ) -> None:
        self.app, self.tokens, self.limits, self.routed, self.proxied = app, tokens, limits, routed, proxied
        self.digest, self.meters, self.echoed = digest, meters, echoed
        self.uploads, self.in_flight = 0, 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        started, headers = time.perf_counter(), _headers(scope)
        route = self.routed(scope)
        answer = _Answer(send, self._request_id(headers), self.echoed)
        scope["state"] = {**scope.get("state", {}), "request_id": answer.request_id}
        try:
            await self._serve(scope, route, headers, receive, answer)
        except Problem as problem:
            await answer.problem(problem, scope, receive)
        except asyncio.CancelledError:
            answer.status = GONE
            raise
        except Exception as error:
            log.exception("request %s failed", answer.request_id)
            title = f"something failed here ({type(error).__name__}); tell the operator this request's id: {answer.request_id}"
            await answer.problem(Problem(500, title, "bug"), scope, receive)
        finally:
            self._note(scope, route.path, answer, time.perf_counter() - started)

    async def _serve(self, scope: Any, route: Route, headers: Mapping[str, str], receive: Receive, answer: "_Answer") -> None:
        if not route.open:
            client = scope.get("client")
            self.tokens.check(headers, client[0] if client else None, self.proxied)
            answer.digest = self.digest
        if scope["method"] in SAFE or not route.answered:  # a page of its own says 404 or 405, and no body is read for it
            await self.app(scope, receive, answer.send)
            return
        self._turn_away(self.in_flight, self.limits.in_flight, "answered")
        self._turn_away(self.uploads, self.limits.uploads, "received")
        self.uploads += 1
        try:
            body = await self._body(headers, receive)
        finally:
            self.uploads -= 1
        if body is None:
            answer.status = GONE
            return
        self._turn_away(self.in_flight, self.limits.in_flight, "answered")
        self.in_flight += 1
        self.meters.in_flight(self.in_flight)
        try:
            await self._answered(scope, headers, body, receive, answer)
        finally:
            self.in_flight -= 1
            self.meters.in_flight(self.in_flight)

    def _turn_away(self, requests: int, most: int, how: str) -> None:
        if requests >= most:
            wait = {"Retry-After": str(self.limits.retry_after_s)}
            raise Problem(429, f"{requests} requests are being {how} already; come back after Retry-After seconds", "busy", wait)

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body, within its limits; None where the client went away."""
        most = self.limits.max_bytes
        too_large = Problem(413, f"the request is larger than {most} bytes; send a smaller image, or cut it into tiles", "bytes")
        with contextlib.suppress(ValueError):
            if int(headers.get("content-length", "0")) > most:
                raise too_large
        body, end = bytearray(), time.monotonic() + self.limits.upload_s
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                seconds = f"{self.limits.upload_s:g}"
                raise Problem(408, f"the image was not there after {seconds} s; send it faster, or a smaller one", "slow") from None
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body"):
                return bytes(body)

    async def _answered(self, scope: Any, headers: Mapping[str, str], body: bytes, receive: Receive, answer: "_Answer") -> None:
        """Lets the app answer, until the deadline or until nobody waits for it any more."""
        deadline_s = self._deadline(headers)
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()  # the app has read all; whether the client is there is watched here
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        work = asyncio.ensure_future(self.app(scope, replay, answer.send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif gone.done():
                answer.status = GONE
            else:
                title = f"no answer within {deadline_s:g} s; send a smaller image, allow more time ({DEADLINE}), or come back later"
                raise Problem(408, title, "deadline")
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    def _deadline(self, headers: Mapping[str, str]) -> float:
        text = headers.get(DEADLINE)
        if text is None:
            return self.limits.deadline_s
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < 1e9:
            raise Problem(400, f"{DEADLINE} is {text[:40]!r}; give a number of seconds above 0", "header")
        return min(seconds, self.limits.deadline_s)

    def _request_id(self, headers: Mapping[str, str]) -> str:
        given = headers.get("x-request-id", "")
        return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    def _note(self, scope: Any, path: str, answer: "_Answer", seconds: float) -> None:
        self.meters.request(path, answer.status, seconds)
        reason = answer.reason or scope["state"].get("reason", "")  # the guard's own, or that of a page
        if reason:
            self.meters.refused(reason)
        # Not "route": under that name Serve's log has the application's prefix.
        about = {"request_id": answer.request_id, "method": scope["method"], "path": path, "status": answer.status}
        log.info("%(method)s %(path)s %(status)s", about, extra={**about, "seconds": round(seconds, 4), "reason": reason})


class _Answer:
    """What is sent, with the headers that every answer has."""

    def __init__(self, send: Send, request_id: str, echoed: bool) -> None:
        self._send, self.request_id, self._echoed = send, request_id, echoed
        self.digest: Callable[[], str] = str  # none, until the client has shown that it may ask
        self.status, self.reason, self.begun = 0, "", False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            own = {name for name, _ in message["headers"]}
            more = SECURITY | {"x-request-id": "" if self._echoed else self.request_id, "x-model-digest": self.digest()}
            message["headers"] = [*message["headers"], *((n.encode(), v.encode()) for n, v in more.items() if v and n.encode() not in own)]
        await self._send(message)

    async def problem(self, problem: Problem, scope: Any, receive: Receive) -> None:
        self.reason = problem.reason
        if not self.begun:
            await problem.response(self.request_id)(scope, receive, self.send)


def _headers(scope: Any) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
