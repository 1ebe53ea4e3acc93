"""The verbs `raysal serve` and `raysal serve promote`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from raysal.cli.options import DASHBOARD, Json
from raysal.cli.tokens import authenticated
from raysal.errors import ConfigError
from raysal.progress import Ui

Made = TypeVar("Made")

Precision = Annotated[
    float | None, typer.Option(help="Pixels abstain (255) unless their class, at their confidence, was right that often on val.")
]
Digest = Annotated[str | None, typer.Option(help="sha256 that the checkpoint must have, or 12 digits of it or more.")]
Tokens = Annotated[Path | None, typer.Option(help="File whose first line is the endpoint's bearer token; or set RAYSAL_TOKENS.")]


def _token(tokens: Path | None) -> str | None:
    """The first token of a file, or of the environment. Raises ConfigError where the file can't be read."""
    from raysal.archive.uris import read_bytes
    from raysal.serving.tokens import ENVIRONMENT, tokens_in

    try:
        text = os.environ.get(ENVIRONMENT, "").replace(",", "\n") if tokens is None else read_bytes(str(tokens)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tokens {tokens}: can't be read ({error}); give a text file with one token a line") from error
    return next(iter(tokens_in(text)), None)


def _checked(kind: Callable[..., Made], **values: Any) -> Made:
    """Settings from options. Raises ConfigError for a value out of its range."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from error


class WithDefault(TyperGroup):
    """`raysal serve CHECKPOINT` is `raysal serve run CHECKPOINT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=WithDefault, no_args_is_help=True, help="The endpoint: answers images with their masks over HTTP, with a page to see them."
)


@app.command()
def run(
    checkpoint: Annotated[str, typer.Argument(help="Folder or URI of a checkpoint.")],
    host: Annotated[str, typer.Option(help="Address to listen on; another one than this machine's own needs tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that hold the model; with two or more a new model costs no answer.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Cores of a replica; 0 shares this machine's among them.")] = 0,
    tokens: Annotated[str | None, typer.Option(help="File with one bearer token a line; or set RAYSAL_TOKENS.")] = None,
    root: Annotated[list[str], typer.Option(help="Folder or bucket whose images clients may name by URI. Repeatable.")] = [],  # noqa: B006
    precision: Precision = None,
    digest: Digest = None,
    reference: Annotated[
        str | None, typer.Option(help="Images, or a data set with a val split, that a new model must do well on before it takes over.")
    ] = None,
    json_: Json = False,
) -> None:
    """Runs the endpoint and its page on this machine until it is interrupted.

    Example: raysal serve runs/demo/rounds/002/checkpoint
    """
    authenticated(starts=True)
    from raysal.model.checkpoint import read_info
    from raysal.serving import local
    from raysal.serving.settings import Gate, Settings

    settings = _checked(
        Settings,
        checkpoint=checkpoint,
        digest=digest,
        precision=precision,
        threads=threads or max(1, (os.cpu_count() or 1) // replicas),
        tokens_file=None if tokens is None else os.path.abspath(tokens),
        roots=tuple(r if "://" in r else os.path.abspath(r) for r in root),
        gate=Gate(reference=reference if reference is None or "://" in reference else os.path.abspath(reference)),
    )
    read_info(checkpoint)  # refused in a second, not once Ray is up
    ui = Ui(json_)
    ui.say("starting Ray and the endpoint")
    dashboard = local.run(settings, host, port, replicas, ui.say)
    authenticated(starts=True)
    url = f"http://{host if ':' not in host else f'[{host}]'}:{port}"
    token = ' -H "Authorization: Bearer TOKEN"' if local.Tokens(settings.tokens_file).wanted else ""
    ui.result(
        {"url": url, "dashboard": dashboard},
        f"masks at {url}, the page too; for example\n"
        f"  curl{token} --data-binary @scene.png {url}/v1/masks -o mask.png\n"
        f"  curl{token} -H 'Accept: application/json' --data-binary @scene.png {url}/v1/masks\n"
        f"another model: raysal serve promote CHECKPOINT --dashboard {dashboard}; Ctrl-C ends it",
    )
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        ui.say("answering what was accepted, then stopping")
        local.stop()


@app.command()
def promote(
    checkpoint: Annotated[str, typer.Argument(help="Folder or URI of the new checkpoint, which every node can read.")],
    dashboard: Annotated[str, typer.Option(help="Address of the cluster's dashboard.")] = DASHBOARD,
    precision: Precision = None,
    digest: Digest = None,
    url: Annotated[str | None, typer.Option(help="Address of the endpoint, to ask its replicas; left out: where Serve listens.")] = None,
    tokens: Tokens = None,
    json_: Json = False,
) -> None:
    """Puts another checkpoint into use while the endpoint answers; one that is damaged, of other classes or worse is refused.

    The same command with the old checkpoint goes back.

    Example: raysal serve promote runs/mars/rounds/003/checkpoint
    """
    authenticated(starts=False)
    from raysal.archive.uris import absolute
    from raysal.model.checkpoint import digest_at
    from raysal.serving import local
    from raysal.serving.settings import ModelSpec

    ui, uri = Ui(json_), absolute(checkpoint)
    spec = _checked(ModelSpec, checkpoint=uri, digest=digest or digest_at(uri), precision=precision)
    found = local.promote(spec, dashboard, ui.say, url=url, token=_token(tokens))
    ui.result({"checkpoint": uri, "digest": spec.digest, "found": found}, f"{uri} answers now, digest {(spec.digest or '')[:12]}: {found}")


@app.command()
def ask(
    images: Annotated[Path, typer.Argument(help="Folder of images; all below it are asked for.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks: a/b.jpg becomes a/b.png.")],
    url: Annotated[str, typer.Option(help="Address of the endpoint.")] = "http://127.0.0.1:8000",
    tokens: Tokens = None,
    at_once: Annotated[int, typer.Option(min=1, help="Requests under way.")] = 8,
    json_: Json = False,
) -> None:
    """Asks an endpoint for the masks of a folder's images. Masks that are there already are not asked for again.

    Example: raysal serve ask downlink/ --out masks
    """
    from raysal.client import Endpoint

    token, ui = _token(tokens), Ui(json_)
    with ui:
        ui.stage(None, "ask", "start", 0)
        failed = Endpoint(url, token).save_masks(images, out, at_once, ui.progress)
    for file, why in [*failed.items()][:20]:
        ui.warning(f"{file}: {why}")
    ui.result({"masks": str(out), "failed": failed}, f"masks {out}: {len(failed)} images have none" if failed else f"masks {out}")
    if failed:
        raise typer.Exit(1)
