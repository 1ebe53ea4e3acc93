"""Exports a labels table: checks it, names its images, writes the format, and gives an account."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

import raysal
from raysal.archive.tables import label_set_in, read_schema, read_table, scan_table
from raysal.archive.uris import absolute, exists, join, list_names, open_fs, read_bytes, read_record, remove_tree, write_bytes
from raysal.config import DataConfig
from raysal.errors import DataError, InputError
from raysal.export import coco, cvat, hugging_face, label_studio, png
from raysal.export.job import COLUMNS, SURVEY_ROWS, Job, Progress, asked, usable
from raysal.export.names import Names
from raysal.export.newest import Newest
from raysal.labels import LabelSet

FORMATS: dict[str, Callable[[Job], None]] = {
    "png": png.write_index,
    "png-colour": png.write_colour,
    "coco": coco.write,
    "cvat": cvat.write,
    "label-studio": label_studio.write,
    "hf": hugging_face.write,
}
"""What writes each format."""

ACCOUNT = "export.json"
"""Written first, so that the folder is known as ours, and again last, when everything else is there."""

OURS = {
    "png": r"masks|classes\.json|names\.csv",
    "png-colour": r"masks|classes\.json|names\.csv",
    "coco": r"annotations\.json|names\.csv",
    "cvat": r"cvat-\d+\.zip|names\.csv",
    "label-studio": r"tasks-\d+\.json|label-config\.xml",
    "hf": r"data|README\.md",
}
"""What each format leaves directly in its folder, and may delete there."""


@dataclass(frozen=True)
class Summary:
    """What came of an export.

    Attributes:
        format: Its name.
        out: Its folder.
        written: Images in it.
        left_out: Rows not in it, by reason: a status of the table, ``superseded`` (the file changed and was labelled again), ``mask``
            (damaged), and with images ``fetch``, ``limit``, ``decode`` or ``changed`` (no longer the file that was labelled).
        files: What was written, below the folder.
        warnings: What the user should know.
    """

    format: str
    out: str
    written: int
    left_out: dict[str, int]
    files: list[str]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people."""
        left = f"; left out: {_reasons(self.left_out)}" if self.left_out else ""
        return f"{self.format} {self.out}: {self.written} masks{left}"


def export_labels(
    labels: str,
    format_: str,
    out: str,
    *,
    classes: str | None = None,
    only: str | None = None,
    below: str | None = None,
    image_root: str | None = None,
    with_images: bool = False,
    on_progress: Progress | None = None,
) -> Summary:
    """Writes the masks of a labels table in a format that other tools read. Memory does not grow with the table.

    Rows with a status other than ``ok`` are left out and counted. The same call again replaces what it wrote before; a call that
    was killed leaves no half file under its final name.

    Args:
        labels: A labels table, any fsspec URI.
        format_: One of `FORMATS`.
        out: Folder to write to, any fsspec URI: new, empty, or of an earlier export of the same labels in the same format.
        classes: File of the label set: classes.json, or a checkpoint's model.json. None takes what the table carries.
        only: Table (a queue, a manifest, ...) whose column ``id`` says which images to write; None writes all.
        below: Folder that the names of images are counted from; None takes the deepest that all of them share.
        image_root: Label Studio: what stands in place of that folder in the images' addresses.
        with_images: Hugging Face: put the image files in too.
        on_progress: Called as on_progress(images done, images in all).

    Raises:
        InputError: Something given can't be used, or the disk is full.
        RaysalError: A store does not answer.
    """
    _check(labels, format_, out, image_root, with_images)
    ids = None if only is None else read_table(only, ["id"])["id"].combine_chunks().unique()
    with Names(extension=format_ == "coco", below=below) as names, Newest() as newest:
        _look(labels, newest, ids)
        label_set, counts, total = _survey(labels, names, newest, ids, None if classes is None else read_classes(classes))
        _prepare(labels, format_, out)
        job = Job(
            absolute(labels), out, label_set, names, total, ids, newest, image_root, with_images, DataConfig().max_bytes, on_progress,
            left_out=counts,
        )  # fmt: skip
        fs, path = open_fs(labels)
        if fs.isdir(path) and not exists(join(labels, "_SUCCESS")):
            job.warnings.append(f"{labels} has no _SUCCESS: labelling has not ended, or was cut short; what is there is exported")
        if ids is not None and (missing := len(ids) - total - counts.total()) > 0:
            job.warnings.append(f"{missing} of the {len(ids)} ids of {only} are not in {labels}")
        FORMATS[format_](job)
        if not job.written:
            raise InputError(f"{labels}: none of the {total} masks could be written ({_reasons(job.left_out)}); nothing to export")
    summary = Summary(format_, out, job.written, dict(sorted(job.left_out.items())), job.files, job.warnings)
    _account(labels, format_, out, summary.to_dict() | {"model_digests": sorted(job.digests), "label_set": label_set.to_dict()})
    return summary


def read_classes(uri: str) -> LabelSet:
    """The label set of a classes.json or of a checkpoint's model.json. Raises InputError where it can't be read."""
    try:
        raw = json.loads(read_bytes(uri))
    except (OSError, ValueError) as error:
        raise InputError(f"{uri}: no label set ({error}); give a classes.json, or the model.json of a checkpoint") from error
    if not isinstance(raw, dict):
        raise DataError(
            f'{uri}: holds a {type(raw).__name__}; expected {{"classes": [{{"id": 0, "name": "soil", "rgb": [128, 0, 0]}}, ...]}}'
        )
    return LabelSet.from_dict(raw.get("label_set", raw), uri)


def _check(labels: str, format_: str, out: str, image_root: str | None, with_images: bool) -> None:
    if format_ not in FORMATS:
        raise InputError(f"no format {format_!r}; there are {', '.join(FORMATS)}")
    if image_root is not None and format_ != "label-studio":
        raise InputError("--image-root goes with --format label-studio only; leave it out")
    if with_images and format_ != "hf":
        raise InputError("--with-images goes with --format hf only; leave it out")
    if re.search(r"\.(json|zip|parquet|png|csv)$", out.rstrip("/")):
        raise InputError(f"{out}: --out is a folder, its files have names of their own; leave out the ending")
    if f"{absolute(out)}/".startswith(f"{absolute(labels).rstrip('/')}/"):
        raise InputError(f"{out}: lies in the labels; name a folder beside them")


def _look(labels: str, newest: Newest, only: pa.Array | None) -> None:
    """Shows every row that is asked for; tables from elsewhere may not say when their rows were made, and have one an image."""
    if "labeled_at" in read_schema(labels).names:
        for batch in scan_table(labels, ("id", "uri", "labeled_at"), SURVEY_ROWS, needed=COLUMNS):
            newest.see(asked(batch, only))


def _survey(labels: str, names: Names, newest: Newest, only: pa.Array | None, given: LabelSet | None) -> tuple[LabelSet, Counter[str], int]:
    """First look at the whole table, without masks: its label set, rows without a mask by status, and how many are to be written.

    Raises:
        InputError: It is no labels table, has no or several label sets, names an image twice, or has nothing to write.
    """
    failed, total, carried = Counter[str](), 0, set[LabelSet | None]()
    for batch in scan_table(labels, COLUMNS[:3], SURVEY_ROWS, needed=COLUMNS):
        carried.add(label_set_in(batch.schema))
        rows = asked(batch, only, newest)
        if superseded := asked(batch, only).num_rows - rows.num_rows:
            failed["superseded"] += superseded
        found = usable(rows)
        names.see(zip(found["id"].to_pylist(), found["uri"].to_pylist(), strict=True))
        total += found.num_rows
        failed.update(str(status) for status in rows["status"].to_pylist() if status != "ok")
    if not total:
        seen = _reasons(failed) or "it is empty" if only is None else "none of the images asked for"
        raise InputError(f"{labels}: no row with status ok to write ({seen}); label images first")
    if twice := names.repeated_ids():
        raise InputError(f"{labels}: {twice} ids repeat; give the table of one labelling, in which each image is one row")
    return given or _one(labels, carried), failed, total


def _one(labels: str, carried: set[LabelSet | None]) -> LabelSet:
    if len(carried) > 1:
        sets = ", ".join(sorted("none" if s is None else f"{s.name!r} of {s.n_classes} classes" for s in carried))
        raise InputError(f"{labels}: its files carry different label sets ({sets}); give the table of one model, or --classes")
    label_set = next(iter(carried))
    if label_set is None:
        raise InputError(f"{labels}: does not say what its class ids mean; give --classes CHECKPOINT/model.json of the model that made it")
    return label_set


def _prepare(labels: str, format_: str, out: str) -> None:
    """Takes the folder for this export and deletes what an earlier one left in it.

    Raises:
        InputError: It is a file, or holds anything that no export of these labels in this format wrote.
    """
    fs, path = open_fs(out)
    if fs.isfile(path):
        raise InputError(f"{out}: is a file; name a folder")
    own = re.compile(rf"({OURS[format_]}|{re.escape(ACCOUNT)})(\.[0-9a-f]{{8}}\.tmp)?")
    names = list_names(out)
    others = [n for n in names if not own.fullmatch(n)]
    if names and not others and ACCOUNT in names:
        before = read_record(join(out, ACCOUNT))
        if (before.get("format"), before.get("labels")) != (format_, absolute(labels)):
            others = [f"the {before.get('format')} export of {before.get('labels')}"]
    elif any(not n.startswith(f"{ACCOUNT}.") for n in names):
        others = others or names
    if others:
        raise InputError(
            f"{out}: holds {', '.join(others[:3])}, which is no export of these labels as {format_}; name an empty or new folder"
        )
    _account(labels, format_, out, None)
    for name in names:
        if name != ACCOUNT:
            remove_tree(join(out, name))


def _account(labels: str, format_: str, out: str, found: dict[str, Any] | None) -> None:
    """Writes the account: what is being exported, and once it is, what came of it."""
    account = {
        "format": format_,
        "labels": absolute(labels),
        "finished": found is not None,
        "raysal_version": raysal.__version__,
        **(found or {}),
    }
    write_bytes(join(out, ACCOUNT), (json.dumps(account, indent=1) + "\n").encode())


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
