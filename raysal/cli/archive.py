"""The verb `raysal index`."""

from __future__ import annotations

from typing import Annotated

import typer

from raysal.cli.options import Json
from raysal.progress import Ui

Given = list[str]


def index(
    places: Annotated[
        Given,
        typer.Argument(
            help="Folders (local, s3://, gs://, http:// pages of links, any fsspec store), zip files, images, or lists of URIs "
            "(.txt, .csv, .parquet).",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for the manifest; one that is there already gets what is new or changed.")],
    mission: Annotated[Given, typer.Option(help="Only msl, m2020, mer1 or mer2; * stands for anything. Repeatable.")] = [],  # noqa: B006
    camera: Annotated[Given, typer.Option(help="Only these cameras: navcam stands for navcam_left and navcam_right.")] = [],  # noqa: B006
    sol: Annotated[Given, typer.Option(help="Only these sols: 100, 100-200 or 100-.")] = [],  # noqa: B006
    site: Annotated[Given, typer.Option(help="Only these sites, written as sols are.")] = [],  # noqa: B006
    drive: Annotated[Given, typer.Option(help="Only these drives, written as sols are.")] = [],  # noqa: B006
    sequence: Annotated[Given, typer.Option(help="Only these sequences, for example 'NCAM*'.")] = [],  # noqa: B006
    min_size: Annotated[str | None, typer.Option(help="Only files of at least so many bytes: 2000, 10k, 2M.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Only files of at most so many bytes.")] = None,
    with_: Annotated[Given, typer.Option("--with", help="Also take thumbnails, subframes, calibration or derived products.")] = [],  # noqa: B006
    without: Annotated[Given, typer.Option(help="Leave out tiles or images too.")] = [],  # noqa: B006
    prune: Annotated[bool, typer.Option("--prune", help="Take images out of the manifest whose files are gone from these places.")] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Exit with 0 although folders or lines of lists could not be read.")
    ] = False,
    json_: Json = False,
) -> None:
    """Lists an archive into a manifest; a second run adds only what is new or changed, and says how many.

    Example: raysal index s3://archive/msl/ --out manifests/msl --camera navcam --sol 3000-
    """
    from raysal.archive import filters
    from raysal.archive.index import index as run

    wanted = filters.Filters(
        missions=tuple(mission),
        cameras=tuple(camera),
        sols=filters.ranges(sol, "--sol"),
        sites=filters.ranges(site, "--site"),
        drives=filters.ranges(drive, "--drive"),
        sequences=tuple(sequence),
        size_bytes=filters.Range(filters.size(min_size, "--min-size"), filters.size(max_size, "--max-size")),
        kinds=filters.kinds(with_, without),
    )
    ui = Ui(json_)
    with ui:
        ui.stage(None, "index", "start", 0)
        summary = run(places, out, wanted, prune=prune, on_progress=lambda files: ui.progress(files, None, {}))
    for example in summary.examples:
        ui.warning(f"not read: {example}")
    ui.result(summary.to_dict(), summary.text())
    if summary.unreadable and not skip_unreadable:
        raise typer.Exit(1)
