"""The verb `raysal plan`."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from raysal.cli.options import Json, OptionalConfig, Set
from raysal.errors import InputError
from raysal.progress import Ui

if TYPE_CHECKING:
    from raysal.plan import Rate, Verb, Work
    from raysal.stream.manifest import Manifest

COUNT = re.compile(r"(\d[\d,_]*(?:\.\d+)?)([kM]?)", re.ASCII)
"""Images as people write them: 700000, 22,000,000, 0.7M."""


def plan(
    images: Annotated[str, typer.Argument(help="How many (700000, 22M); or a manifest, or a place with images.")],
    hours: Annotated[float | None, typer.Option(min=0.01, help="Time for it; says how many nodes.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes for it; says how many hours.")] = None,
    verb: Annotated[Literal["label", "score"], typer.Option(help="What is to be done.")] = "label",
    cores: Annotated[int, typer.Option(min=1, help="Cores of a node; two vCPUs of most clouds are one.")] = 8,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Its CPUs as Ray counts them, vCPUs. Default: two a core.", show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of a node.")] = 0,
    memory: Annotated[str | None, typer.Option(help="Memory of a node, for example 32G: fewer actors where it is short.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a node and hour, in any currency.")] = None,
    px: Annotated[int | None, typer.Option(min=16, help="Side of an image in pixels.")] = None,
    scale: Annotated[float, typer.Option(min=0.01, max=4, help="What images are resized by before the network (data.input_scale).")] = 1.0,
    image_bytes: Annotated[str | None, typer.Option(help="Size of a file, for example 200k. Default: as the manifest says.")] = None,
    like: Annotated[
        Literal["resnet18", "resnet18-bfloat16", "mobilenetv3"],
        typer.Option(help="Encoder whose rate, measured by us on small CPUs, is taken; in bfloat16 for CPUs that compute in it."),
    ] = "resnet18",
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Instead: images a second of one core, as you measured them.")] = None,
    gpu_rate: Annotated[float | None, typer.Option(min=1e-6, help="Instead: images a second of one GPU, as you measured them.")] = None,
    measure: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Instead: try this model on some of the images, on this machine.")
    ] = None,
    spare: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the time left over for deaths and slow nodes.")] = 0.2,
    config: OptionalConfig = None,
    set_: Set = [],  # noqa: B006 - typer reads the default once
    json_: Json = False,
) -> None:
    """How many nodes masks or scores of an archive take within some hours, or how many hours on some nodes. Changes nothing.

    Example: raysal plan 22M --hours 24 --px 512 --cores 8 --memory 64G --price 0.80
    """
    from raysal.archive.filters import size
    from raysal.plan import MEASURED, Node, Rate, Work, hours_on, nodes_for, row_bytes

    if (hours is None) == (nodes is None):
        raise InputError("give --hours to learn how many nodes it takes, or --nodes to learn how many hours")
    if sum(given is not None for given in (rate, gpu_rate, measure)) > 1:
        raise InputError("--rate, --gpu-rate and --measure each say how fast it goes; give one of them")
    seen = None if px is None else px * scale
    if measure is not None:
        work, speed = _measured(images, measure, verb, config, set_, seen)
    else:
        n, mean_bytes = _counted(images)
        work = Work(n, None if verb == "label" and px is None else row_bytes(verb, px or 0), mean_bytes, seen)
        if gpu_rate is not None:
            speed = Rate(gpu_rate, "GPU", "as given")
        elif rate is not None:
            speed = Rate(rate, "core", "as given")
        elif gpus:
            raise InputError("we measured no GPU: give --gpu-rate, images a second of one, or --measure CHECKPOINT where there is one")
        elif seen is None:
            raise InputError("say how large images are (--px 1024 --scale 0.5), or how fast they go (--rate, --gpu-rate or --measure)")
        else:
            speed = MEASURED[like].at(seen)
    if image_bytes is not None:
        work = Work(work.images, work.row_bytes, size(image_bytes, "--image-bytes"), work.px)
    node = Node(cores, gpus, size(memory, "--memory"), price, cpus or 2 * cores)
    found = nodes_for(hours, work, node, speed, spare) if hours is not None else hours_on(nodes or 1, work, node, speed, spare)
    Ui(json_).result(found.to_dict(), found.text())


def _counted(images: str) -> tuple[int, float | None]:
    """Images, and the mean size of their files where a manifest tells it."""
    if found := COUNT.fullmatch(images.strip()):
        n = round(float(re.sub("[,_]", "", found[1])) * {"": 1, "k": 1e3, "M": 1e6}[found[2]])
        if n < 1:
            raise InputError(f"{images}: at least one image")
        return n, None
    from raysal.stream.archive import open_manifest

    return _sizes(open_manifest(images))


def _sizes(manifest: Manifest) -> tuple[int, float | None]:
    from raysal.archive.tables import read_schema, scan_table

    known = n = total = 0
    batches = (
        scan_table(manifest, [c for c in ("id", "size") if c in read_schema(manifest).names], 65_536)
        if isinstance(manifest, str)
        else manifest.to_batches()
    )
    for batch in batches:
        n += batch.num_rows
        if "size" in batch.schema.names:
            column = batch["size"].drop_null()
            known += len(column)
            total += column.sum().as_py() or 0
    return n, total / known if known else None


def _measured(images: str, checkpoint: str, verb: Verb, config: Path | None, set_: list[str], px: float | None) -> tuple[Work, Rate]:
    """Work and rate from some of the images, as `--dry-run` of the verb tries them."""
    from raysal.config import load
    from raysal.plan import Rate, Work
    from raysal.stream.archive import open_manifest
    from raysal.stream.label import label_forecast
    from raysal.stream.score import score_forecast

    if COUNT.fullmatch(images.strip()):
        raise InputError(f"--measure tries some of the images: give a manifest or a place instead of {images}")
    cfg = load(config, set_)
    with tempfile.TemporaryDirectory() as folder:
        forecast = label_forecast if verb == "label" else score_forecast
        found = forecast(open_manifest(images), checkpoint, os.path.join(folder, "none"), cfg)
    if not found.counts.get("ok"):
        raise InputError(f"{images}: not one of {found.sampled} images could be used ({found.counts}); see raysal {verb} --dry-run")
    share = 1 if cfg.compute.use_gpu else os.cpu_count() or 1
    source = f"{found.sampled} of the images tried here" + ("" if cfg.compute.use_gpu else f" by one process on {share} cores")
    work = Work(found.todo, found.bytes_written / found.todo, found.bytes_read / found.todo, px)
    return work, Rate(found.todo / found.seconds / share, "GPU" if cfg.compute.use_gpu else "core", source)
