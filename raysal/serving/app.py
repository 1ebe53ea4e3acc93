"""The HTTP interface. Everything that a client sees of it is described in its OpenAPI (``/openapi.json``, ``/docs``)."""

import asyncio
import html
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.routing import Match

import raysal
from raysal.serving import pages
from raysal.serving.guard import DEADLINE, SAFE, Guard, Route
from raysal.serving.intake import Upload, fetch, paired
from raysal.serving.problems import STATUSES, TYPE, Problem
from raysal.serving.service import Answer, Done, Service
from raysal.serving.tokens import Tokens

ASSETS = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
EXAMPLES = 3
OPEN = ("/", "/docs", "/openapi.json", "/static/{name}", "/examples/{number}", "/v1/healthz", "/v1/readyz")
"""What needs no token: it tells nothing of images or models."""

View = Literal["index", "colour", "uncertainty", "entropy"]

PROBLEM = {
    "type": "object",
    "required": ["type", "status", "title", "reason", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "status": {"type": "integer"},
        "title": {"type": "string", "description": "What was seen, and what to do."},
        "reason": {"type": "string", "description": "A short word, the same for the same cause."},
        "request_id": {"type": "string"},
    },
}

BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}}}
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["uri"],
                "properties": {"uri": {"type": "string", "description": "An image under a root that the operator opened."}},
            }
        },
    },
    "description": "The bytes of one image (JPEG, PNG, TIFF, VICAR, PDS3 with its label attached; the type is seen by content), "
    "or a form with several, or a URI.",
}

HEADERS = [
    {
        "name": DEADLINE,
        "in": "header",
        "required": False,
        "schema": {"type": "number", "exclusiveMinimum": 0},
        "description": "Seconds after which the answer is of no use (408).",
    }
]


def make_app(service: Service, tokens: Tokens, proxied: bool, echoed: bool = False, replica: str = "") -> Any:
    """The ASGI app.

    Args:
        service: What answers.
        tokens: Who may ask.
        proxied, echoed: As in `raysal.serving.guard.Guard`.
        replica: What Serve calls the replica, where there are several: ``/v1/model`` tells it.
    """
    app = FastAPI(
        title="raysal",
        version=raysal.__version__,
        summary="Masks of rover images",
        description="Answers name their model (X-Model-Digest) and their request (X-Request-Id). What goes wrong is problem+json with "
        "a title that says what to do.",
        docs_url=None,
        redoc_url=None,
    )
    _add_problems(app)
    _add_answers(app, service)
    _add_state(app, service, replica)
    _add_page(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    digest: Callable[[], str] = lambda: service.model.digest if service.model else ""  # noqa: E731
    return Guard(app, tokens, service.settings.limits, partial(_routed, app), proxied, digest, service.meters, echoed)


def _routed(app: FastAPI, scope: Any) -> Route:
    """The route that answers a request; where there is none, the one that answers other methods at its path."""
    path, answered = "other", False
    for route in app.routes:
        match, _ = route.matches(scope)
        if match != Match.NONE:
            path, answered = getattr(route, "path", "other"), match == Match.FULL
        if answered:
            break
    return Route(path, answered, path in OPEN and scope["method"] in SAFE)


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/masks",
        summary="Masks of one image or several",
        response_class=Response,
        responses={
            200: {
                "description": "One image: a PNG of its size (class ids, 255 = abstained) or JSON. Several: JSON, or PNGs in a zip file.",
                "content": {
                    "image/png": {"schema": {"type": "string", "format": "binary"}},
                    "application/json": {"schema": {"type": "object"}},
                    "application/zip": {"schema": {"type": "string", "format": "binary"}},
                },
            },
            **_problems(400, 401, 406, 408, 413, 415, 422, 429, 500, 503),
        },
        openapi_extra={"requestBody": BODY, "parameters": HEADERS},
    )
    async def masks(
        request: Request,
        view: Annotated[
            View, Query(description="Of pictures: class ids, colours, or a map of doubt from 0 to 255. In JSON a map is added.")
        ] = "index",
    ) -> Response:
        several, uploads = await _uploads(request, service)
        form = pages.form_of(request.headers.get("accept", ""), several)
        encode = pages.numbers if form == "application/json" else partial(pages.picture, view=view)
        done = await _all(service, uploads, pages.wants_of(form, view), encode, several)
        good = [d for d in done if isinstance(d, Answer)]
        if form == "application/json":
            body = await service.encoded(lambda: _json(done, several))
        elif form == "application/zip":
            if bad := next((d for d in done if isinstance(d, Problem)), None):
                raise bad
            body = await service.encoded(lambda: pages.archive([d.name for d in good], [d.body for d in good]))
        else:
            body = good[0].body
        return Response(body, 200, _by(done), form)

    @app.post(
        "/v1/scores",
        summary="What images are worth asking a person about",
        response_class=JSONResponse,
        responses={
            200: {
                "description": "Scores from 0 to 1, and shares of classes.",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            **_problems(400, 401, 408, 413, 415, 422, 429, 500, 503),
        },
        openapi_extra={"requestBody": BODY, "parameters": HEADERS},
    )
    async def scores(request: Request) -> Response:
        several, uploads = await _uploads(request, service)
        done = await _all(service, uploads, frozenset({"scores"}), pages.numbers, several)
        return Response(await service.encoded(lambda: _json(done, several)), 200, _by(done), "application/json")


def _add_state(app: FastAPI, service: Service, replica: str) -> None:
    @app.get("/v1/model", summary="The model in use", responses=_problems(401, 503))
    async def model() -> dict[str, Any]:
        return pages.model_card(service.in_use()) | {"refusal": service.refusal, "replica": replica}

    @app.get("/v1/healthz", summary="Whether the process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/readyz", summary="Whether it can answer", responses=_problems(503))
    async def readyz() -> dict[str, str]:
        service.in_use()
        return {"status": "ready"}


def _add_page(app: FastAPI) -> None:
    folder = files("raysal.serving") / "page"
    example: dict[int, bytes] = {}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse((folder / "index.html").read_text(encoding="utf-8"))

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in ASSETS:
            raise Problem(404, "there is no such file; the page is at /", "path")
        return Response((folder / name).read_bytes(), 200, {"cache-control": "no-cache"}, ASSETS[name])

    @app.get("/examples/{number}", include_in_schema=False)
    async def examples(number: int) -> Response:
        if not 0 <= number < EXAMPLES:
            raise Problem(404, f"there are {EXAMPLES} examples, from 0", "path")
        if number not in example:
            example[number] = await asyncio.to_thread(_scene, number)
        return Response(example[number], 200, {"cache-control": "max-age=3600"}, "image/png")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_docs(app.openapi()))


def _add_problems(app: FastAPI) -> None:
    def answered(request: Request, problem: Problem) -> Response:
        request.state.reason = problem.reason
        return problem.response(request.state.request_id)

    @app.exception_handler(Problem)
    async def ours(request: Request, problem: Problem) -> Response:
        return answered(request, problem)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if part not in ("query", "path"))
        return answered(request, Problem(400, f"{name}: {first['msg']}; see /docs", "parameter"))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        help_ = {404: "there is no such page; see /docs", 405: "that method is not answered here; see /docs"}
        status = error.status_code if error.status_code in STATUSES else 400
        return answered(request, Problem(status, help_.get(status, str(error.detail)), "http", dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        id_ = request.state.request_id
        return answered(
            request, Problem(500, f"something failed here ({type(error).__name__}); tell the operator this request's id: {id_}", "bug")
        )


async def _uploads(request: Request, service: Service) -> tuple[bool, list[Upload]]:
    """Whether several images were asked about, and the images."""
    limits = service.settings.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=2 * limits.max_images, max_fields=8) as form:
                parts = [value for _, value in form.multi_items() if not isinstance(value, str)]
                uploads = paired([(_name(part.filename), await part.read()) for part in parts])
        except (MultiPartException, HTTPException, ValueError, KeyError) as error:
            said = " ".join(str(getattr(error, "detail", error)).split())[:200]
            raise Problem(400, f"the form can't be read ({said}); send it as curl -F image=@scene.png does", "form") from error
        if len(uploads) > limits.max_images:
            raise Problem(413, f"{len(uploads)} images in one request; send at most {limits.max_images}", "images")
        return len(uploads) > 1, uploads
    body = await request.body()
    if kind == "application/json":
        try:
            uri = json.loads(body)["uri"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Problem(400, 'the body is no JSON with a uri; send {"uri": "..."}, or an image\'s bytes', "json") from error
        if not isinstance(uri, str):
            raise Problem(400, "uri must be text", "json")
        return False, [await asyncio.to_thread(fetch, uri, service.settings.roots, limits)]
    return False, [Upload(_name(unquote(request.headers.get("x-image-name", ""))), body)]


async def _all(
    service: Service, uploads: list[Upload], wants: frozenset[str], encode: Callable[[Done], Any], several: bool
) -> list[Answer | Problem]:
    """Every image's answer. Of several each may fail alone; of one its problem is the request's."""
    if not several:
        return [await service.answer(uploads[0], wants, encode)]

    async def one(upload: Upload) -> Answer | Problem:
        try:
            return await service.answer(upload, wants, encode)
        except Problem as problem:
            return problem

    tasks = [asyncio.ensure_future(one(upload)) for upload in uploads]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _by(done: Sequence[Answer | Problem]) -> dict[str, str]:
    """Names the model that answered: after a swap it may not be the one in use any more."""
    digest = next((d.digest for d in done if isinstance(d, Answer)), None)
    return {} if digest is None else {"x-model-digest": digest}


def _json(done: list[Answer | Problem], several: bool) -> bytes:
    found = [{"problem": {"status": d.status, "title": d.title, "reason": d.reason}} if isinstance(d, Problem) else d.body for d in done]
    return json.dumps({"images": found} if several else found[0], allow_nan=False).encode()


def _name(given: str | None) -> str:
    """What an image is called in messages: its file's name, short and on one line."""
    name = "".join(c for c in (given or "").replace("\\", "/").rpartition("/")[2] if c.isprintable())
    return name[-120:] or "image"


def _scene(number: int) -> bytes:
    import io

    from PIL import Image

    from raysal.datasets.synthetic import scene

    file = io.BytesIO()
    Image.fromarray(scene(0, number, 256)[0]).save(file, "PNG")
    return file.getvalue()


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": STATUSES[status], "content": {TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
        for status in (*statuses, 404, 405)
    }


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description without the answers that we do not give, with ours."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["security"] = [{"token": []}] if "401" in operation["responses"] else []
        schema.setdefault("components", {})["schemas"] = {"Problem": PROBLEM}
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = schema
    return app.openapi_schema


def _docs(schema: dict[str, Any]) -> str:
    """The interface as a page that needs no script."""
    rows = []
    for path, operations in schema["paths"].items():
        for method, about in operations.items():
            statuses = "".join(f"<li><b>{s}</b> {html.escape(r['description'])}" for s, r in sorted(about["responses"].items()))
            parameters = "".join(
                f"<li><code>{html.escape(p['name'])}</code> ({p['in']}) {html.escape(p.get('description', ''))}"
                for p in about.get("parameters", [])
            )
            rows.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(about.get('summary', ''))}"
                f"<ul>{parameters}</ul><ul>{statuses}</ul>"
            )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>raysal: the interface</title>"
        "<link rel=stylesheet href=static/page.css><main class=docs><h1>raysal</h1>"
        f"<p>{html.escape(schema['info']['description'])} As data: <a href=openapi.json>openapi.json</a>.</p>{''.join(rows)}</main></html>"
    )
