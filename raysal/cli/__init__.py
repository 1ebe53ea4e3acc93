"""The command line: one verb is one function of the library. ``raysal VERB --help`` explains each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from raysal.cli import serving, submit
from raysal.cli.archive import index
from raysal.cli.options import ConfigFile, DryRun, Json, OptionalConfig, Set, Version
from raysal.cli.planning import plan
from raysal.config import Config, load
from raysal.environment import check_client
from raysal.errors import ConfigError, RaysalError
from raysal.progress import Ui, audited, failed, measured, number

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turns a mission's archive of rover images and about 3% of hand labels into masks for every image.",
)


@app.callback()
def _options(version: Version = False) -> None: ...


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of everything the demo leaves.")] = Path("runs/demo"),
    set_: Set = [],  # noqa: B006 - typer reads the default once
    json_: Json = False,
) -> None:
    """The whole loop on synthetic Mars scenes on this machine: minutes, ends with a report and masks.

    Example: raysal demo
    """
    cfg = load(packaged_config("demo"), [f"run={json.dumps(str(out))}", *set_])
    _run_loop(cfg, json_)


@app.command()
def loop(config: ConfigFile, set_: Set = [], dry_run: DryRun = False, json_: Json = False) -> None:  # noqa: B006
    """Rounds of train, score, query and buy until the budget or a stopping rule; then masks for the pool. The same command resumes.

    Example: raysal loop --config configs/marsscapes.yaml --set data.root=/data/mars
    """
    cfg = load(config, set_)
    if dry_run:
        _dry_run(cfg, json_)
    else:
        _run_loop(cfg, json_)


@app.command()
def train(
    config: ConfigFile,
    labels: Annotated[
        list[str],
        typer.Option(
            help="Images to learn from: a run folder (all that it bought), a labels.parquet of one of its rounds, or a text file of names. "
            "Repeatable. Default: the whole pool split."
        ),
    ] = [],  # noqa: B006
    set_: Set = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """CPS-Mars on Ray Train: one training on given labels. The same command resumes.

    Example: raysal train --config configs/marsscapes.yaml --labels names.txt --set run=runs/once
    """
    from raysal.cluster import connected
    from raysal.rounds.single import train_once

    cfg = load(config, set_)
    with Ui.of(json_, cfg) as ui, connected(cfg.compute):
        result = train_once(cfg, labels, ui.watcher())
    ui.result(result, f"checkpoint {result['checkpoint']}\nval mIoU {number(result['miou'])}")


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder (any fsspec URI).")],
    dataset: Annotated[str, typer.Argument(help="Data set folder (any fsspec URI).")],
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "val",
    reader: Annotated[
        str | None, typer.Option(help="Layout: folder, s5mars or ai4mars. Default: that of --config, without one: folder.")
    ] = None,
    config: OptionalConfig = None,
    set_: Set = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """mIoU, per-class IoU, confusion and calibration of a checkpoint on a labelled split.

    Example: raysal evaluate runs/demo/rounds/002/checkpoint runs/demo/data --split val
    """
    from raysal.rounds.single import evaluate_checkpoint

    cfg = _of_folder(dataset, reader, config, set_)
    with Ui.of(json_, cfg, checkpoint) as ui:
        result = evaluate_checkpoint(checkpoint, cfg, split, ui.progress)
    ui.result(result, lambda: print(measured(result), flush=True))


@app.command()
def audit(
    labels: Annotated[str, typer.Argument(help="Table of masks: a folder or file of Parquet.")],
    checkpoint: Annotated[str, typer.Argument(help="The checkpoint folder that made them.")],
    dataset: Annotated[str, typer.Argument(help="Data set folder that holds the experts' masks of the images to check.")],
    images: Annotated[int, typer.Option(min=1, help="Random images to check; all where there are fewer.")] = 30,
    learnt: Annotated[
        list[str],
        typer.Option(
            help="Labels that the model learnt from, left out: a run folder, a labels.parquet or a text file of names. Repeatable."
        ),
    ] = [],  # noqa: B006
    ask: Annotated[str | None, typer.Option(help="Write the names of the images to label to this file, and stop.")] = None,
    out: Annotated[str | None, typer.Option(help="JSON file for the result.")] = None,
    reader: Annotated[str | None, typer.Option(help="Layout: folder, s5mars or ai4mars. Default: that of --config, or folder.")] = None,
    config: OptionalConfig = None,
    set_: Set = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """How good masks are where nobody labelled, with an interval, from a few random images that experts did.

    Example: raysal audit runs/demo/labels runs/demo/rounds/002/checkpoint runs/demo/data --images 30 --learnt runs/demo
    """
    from raysal.rounds.ledger import write_json
    from raysal.rounds.single import audit_labels

    cfg = _of_folder(dataset, reader, config, set_)
    with Ui.of(json_, cfg, labels) as ui:
        result = audit_labels(labels, checkpoint, cfg, images, learnt, ask, ui.progress)
    if ask:
        ui.result(result, f"{ask}: {len(result['images'])} images to label; then run the same command without --ask")
        return
    if out:
        write_json(out, result)
    ui.result(result, lambda: print(audited(result), flush=True))


Manifest = Annotated[
    str, typer.Argument(help="Folder of images, or any Parquet with id and uri: a manifest, also scores or labels that are fed back.")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Also do images again that failed before.")]
Replace = Annotated[bool, typer.Option("--replace", help="Drop rows that another model or configuration left in --out.")]


@app.command()
def score(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder (any fsspec URI).")],
    manifest: Manifest,
    out: Annotated[str, typer.Option(help="Folder for the scores table.")],
    retry_failed: RetryFailed = False,
    replace: Replace = False,
    dry_run: DryRun = False,
    config: OptionalConfig = None,
    set_: Set = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """Streams images through both branches and writes one row of scores an image. A second run does only new images.

    Example: raysal score runs/demo/rounds/002/checkpoint runs/demo/manifest.parquet --out runs/demo/scores
    """
    from raysal.stream.archive import open_manifest
    from raysal.stream.score import score_forecast, score_pool

    cfg = load(config, set_)
    ui, table = Ui.of(json_, cfg, out), open_manifest(manifest)
    if dry_run:
        found = score_forecast(table, checkpoint, out, cfg, retry_failed, replace)
        return ui.result(found.to_dict(), str(found))
    with ui:
        summary = score_pool(table, checkpoint, out, cfg, on_progress=ui.progress, retry_failed=retry_failed, replace=replace)
    ui.result({"scores": out, **summary.to_dict()}, f"scores {out}: {summary}")


@app.command()
def label(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder (any fsspec URI).")],
    manifest: Manifest,
    out: Annotated[str, typer.Option(help="Folder for the masks.")],
    precision: Annotated[
        float | None, typer.Option(help="Pixels of which val does not promise this share of right ones abstain (255), for example 0.95.")
    ] = None,
    retry_failed: RetryFailed = False,
    replace: Replace = False,
    watch: Annotated[float | None, typer.Option(min=1, help="Look for new images every so many seconds, until stopped.")] = None,
    dry_run: DryRun = False,
    config: OptionalConfig = None,
    set_: Set = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """Masks for every image of an archive. A second run labels only new images.

    Example: raysal label runs/demo/checkpoint archive/images --out labels --precision 0.95
    """
    from raysal.stream.archive import label_archive, open_manifest
    from raysal.stream.label import label_forecast

    asked = [f"label.precision={precision}"] if precision is not None else []
    cfg = load(config, [*asked, *set_])
    ui = Ui.of(json_, cfg, out)
    if dry_run:
        found = label_forecast(open_manifest(manifest), checkpoint, out, cfg, retry_failed, replace)
        return ui.result(found.to_dict(), str(found))
    with ui:
        for summary in label_archive(manifest, checkpoint, out, cfg, ui.progress, ui.warning, retry_failed, replace, watch):
            ui.result({"labels": out, **summary.to_dict()}, f"labels {out}: {summary}")


app.command()(index)
app.command()(plan)
app.add_typer(serving.app, name="serve")
app.add_typer(submit.app, name="submit")


@app.command()
def query(
    scores: Annotated[str, typer.Argument(help="Scores table: a folder or file of Parquet.")],
    budget: Annotated[int, typer.Option(min=1, help="Images to choose.")],
    out: Annotated[str, typer.Option(help="Parquet file for the queue.")],
    strategy: Annotated[
        str | None,
        typer.Option(help="random, entropy, uncertainty, ueq, ...; see docs/method.md. Default: that of --config, without one: ueq."),
    ] = None,
    labeled: Annotated[
        list[str],
        typer.Option(help="Labels that exist already (a run folder, or a labels.parquet): never chosen again. Repeatable."),
    ] = [],  # noqa: B006
    manifest: Annotated[str | None, typer.Option(help="Manifest with sites and drives, for query.group_cap.")] = None,
    config: OptionalConfig = None,
    set_: Set = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """Picks what to label next from a scores table.

    Example: raysal query runs/demo/rounds/000/scores --strategy ueq --budget 42 --out queue.parquet
    """
    from raysal.rounds.single import query_scores

    asked = [f"query.strategy={json.dumps(strategy)}"] if strategy is not None else []
    cfg = load(config, [*asked, *set_])
    ui = Ui.of(json_, cfg, out)
    rows = query_scores(scores, cfg, budget, out, labeled, manifest)
    text = "\n".join(f"{r['rank']:>5}  {number(r['score'])}  {r['uri']}" for r in rows[:20])
    more = f"\n  ... and {len(rows) - 20} more" if len(rows) > 20 else ""
    ui.result({"queue": out, "chosen": rows}, f"{text}{more}\nqueue {out}: {len(rows)} images by {cfg.query.strategy}")


@app.command()
def synth(
    out: Annotated[str, typer.Argument(help="Folder or fsspec URI of the archive.")],
    images: Annotated[int, typer.Option(min=1, help="Scenes of the pool (split train).")] = 400,
    val_images: Annotated[int, typer.Option(min=0, help="Held-out scenes (split val).")] = 64,
    size: Annotated[int, typer.Option(min=32, max=4096, help="Height and width in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another planet day.")] = 0,
    json_: Json = False,
) -> None:
    """Writes a synthetic archive of Mars scenes with exact masks; the same seed gives the same bytes.

    Example: raysal synth archive --images 1000 --size 256 --seed 7
    """
    from raysal.datasets.synthetic import write_archive

    with Ui(json_) as ui:
        ui.stage(None, "synth", "start", 0)
        write_archive(out, images, val_images, size, seed, progress=lambda done, total: ui.progress(done, total, {}))
    ui.result({"archive": out, "images": images, "val_images": val_images}, f"archive {out}: {images} + {val_images} scenes of {size} px")


@app.command()
def export(
    labels: Annotated[str, typer.Argument(help="Table of masks: a folder or file of Parquet.")],
    format_: Annotated[str, typer.Option("--format", help="png, png-colour, coco, cvat, label-studio or hf; see docs/export.md.")],
    out: Annotated[str, typer.Option(help="Folder to write to: new, empty, or of an earlier export of the same.")],
    classes: Annotated[
        str | None, typer.Option(help="classes.json, or a checkpoint's model.json. Default: what the table carries.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Write only the images of this table: a queue, a manifest, any Parquet with id.")] = None,
    below: Annotated[
        str | None, typer.Option(help="Folder that names are counted from. Default: the deepest that all images share.")
    ] = None,
    image_root: Annotated[str | None, typer.Option(help="Label Studio: where it finds that folder, as a URL or path of its own.")] = None,
    with_images: Annotated[bool, typer.Option("--with-images", help="Hugging Face: put the image files in too.")] = False,
    json_: Json = False,
) -> None:
    """Masks in the formats that others read; images without a mask are left out and counted. The same command again starts over.

    Example: raysal export runs/demo/labels --format coco --out runs/demo/coco
    """
    from raysal.export.run import export_labels

    with Ui(json_) as ui:
        ui.stage(None, "export", "start", 0)
        summary = export_labels(
            labels, format_, out, classes=classes, only=only, below=below, image_root=image_root, with_images=with_images,
            on_progress=lambda done, total: ui.progress(done, total, {}),
        )  # fmt: skip
    for warning in summary.warnings:
        ui.warning(warning)
    ui.result(summary.to_dict(), summary.text())


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="Run folder, or folder of scores or labels.")],
    manifest: Annotated[
        str | None, typer.Option(help="Scores and labels: manifest with sols (else sites, groups) for the class map.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write to. Default: report/ in a run, FOLDER-report beside a table.")] = None,
    json_: Json = False,
) -> None:
    """The HTML report of a run, or of what raysal score or raysal label wrote: distributions, class maps, good and bad cases, failures.

    Example: raysal report runs/demo
    """
    from raysal.report import build

    with Ui(json_) as ui:
        ui.stage(None, "report", "start", 0)
        page = build(folder, manifest, out, lambda done, total: ui.progress(done, total, {}))
    ui.result({"report": page}, f"report {page}")


def packaged_config(name: str) -> Path:
    """A configuration that ships with raysal: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parents[1]
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ConfigError(f"configs/{name}.yaml is missing from this installation; install raysal again")


def main(*verb: str) -> None:
    """Entry point: maps errors to exit codes (0 done, 1 failed, 2 bad usage or input). A verb goes before the arguments of the process."""
    _quiet()
    try:
        check_client()
        app([*verb, *sys.argv[1:]])
    except RaysalError as error:
        failed(error)
        sys.exit(error.exit_code)


def _of_folder(dataset: str, reader: str | None, config: Path | None, set_: list[str]) -> Config:
    """A configuration for a data set that lies in a folder."""
    layout = [f"data.reader={json.dumps(reader)}"] if reader is not None else []
    cfg = load(config, [f"data.root={json.dumps(dataset)}", *layout, *set_])
    if cfg.data.reader == "synthetic":  # scenes that were drawn are a folder like any other; none are drawn here
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"reader": "folder"})})
    return cfg


def _run_loop(cfg: Config, as_json: bool) -> None:
    from raysal.cluster import connected
    from raysal.report import build
    from raysal.rounds.loop import run_loop

    with Ui.of(as_json, cfg) as ui, connected(cfg.compute):
        outcome = run_loop(cfg, ui.watcher())
        page = build(outcome.run)
    result = {
        "run": outcome.run,
        "stopped": outcome.stopped,
        "checkpoint": outcome.checkpoint,
        "labels": outcome.labels,
        "audit": outcome.audit,
        "report": page,
        "rounds": [{k: m[k] for k in ("round", "labels", "miou", "seconds")} for m in outcome.rounds],
    }
    ui.result(result, lambda: ui.summary(outcome, page, cfg))


def _dry_run(cfg: Config, as_json: bool) -> None:
    from raysal.rounds.estimate import estimate

    with Ui.of(as_json, cfg) as ui:
        plan = estimate(cfg)
    ui.result(plan.to_dict(), plan.text())


def _quiet() -> None:
    """Libraries that greet, warn of their own future, or phone home are kept quiet; RAYSAL_WORKER_LOGS=1 shows Ray's workers."""
    for key, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(key, value)
