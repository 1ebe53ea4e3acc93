"""An archive as a user names it, labelled once or as long as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from raysal.archive.entries import IMAGES
from raysal.archive.index import rows_of
from raysal.archive.publish import RECORD
from raysal.archive.uris import exists, list_names, open_fs, store_errors
from raysal.config import Config
from raysal.errors import CheckpointError, ConfigError, InputError, RaysalError
from raysal.stream.label import label_pool
from raysal.stream.manifest import Manifest
from raysal.stream.pool import Kept, Progress, Summary
from raysal.stream.worker import RUN

PARQUET_MAGIC = b"PAR1"

SETTLED_S = 10.0
"""A file of a watched folder that is younger may still be being written."""

RETRY_S, LONGEST_RETRY_S = 3600.0, 86400.0
"""Until images of a watched place that could not be fetched are asked for again, and what that grows to by doubling."""


def label_archive(
    place: str,
    checkpoint_uri: str,
    out: str,
    cfg: Config,
    on_progress: Progress,
    on_warning: Callable[[str], None],
    retry_failed: bool = False,
    replace: bool = False,
    every_s: float | None = None,
) -> Iterator[Summary]:
    """Labels what is new in an archive, once or whenever something came.

    Args:
        place: As `open_manifest` takes it; read again each time.
        checkpoint_uri, out, cfg, retry_failed, replace: As in `raysal.stream.label.label_pool`.
        on_progress: As there.
        on_warning: Told of trouble that a next look may not meet.
        every_s: Seconds between looks; None looks once.

    Yields:
        What each look did; looks that found nothing new are passed over, but for the first.
    """
    label = partial(label_pool, checkpoint_uri=checkpoint_uri, out_uri=out, cfg=cfg, on_progress=on_progress)
    if every_s is None:
        yield label(open_manifest(place), retry_failed=retry_failed, replace=replace)
    else:
        yield from _watch(place, partial(label, kept=Kept()), on_warning, retry_failed, replace, every_s)


def _watch(
    place: str, label: Callable[..., Summary], on_warning: Callable[[str], None], retry_failed: bool, replace: bool, every_s: float
) -> Iterator[Summary]:
    """Looks for ever. What is wrong at the first look, or with the first labels, ends it; later trouble is told and may pass."""
    _require(place)
    looked = begun = False
    said, lost, retry_s, retry_at = "", 0, RETRY_S, time.monotonic() + RETRY_S

    def warn(text: str) -> None:
        nonlocal said
        if text != said:  # not at every look again
            said = text
            on_warning(text)

    while True:
        survives, now = looked, time.monotonic()
        again: bool | str = retry_failed if not begun else "fetch" if now >= retry_at else False
        try:
            images = _settled(_images(place, warn), min(every_s, SETTLED_S))
            looked, survives = True, begun
            if isinstance(images, str) or images.num_rows:
                summary = label(images, retry_failed=again, replace=replace and not begun)
                if begun and again:
                    retry_s = min(2 * retry_s, LONGEST_RETRY_S)
                    retry_at = now + retry_s
                elif summary.counts["fetch"] > lost:
                    retry_s, retry_at = RETRY_S, min(retry_at, now + RETRY_S)
                lost = summary.counts["fetch"]
                if not begun or summary.done:
                    yield summary
                begun = True
        except RaysalError as error:
            if not survives or isinstance(error, ConfigError | CheckpointError):
                raise
            warn(f"{error}; looking again in {every_s:g} s")
        time.sleep(every_s)


def _settled(images: Manifest, seconds: float) -> Manifest:
    """Without files that were written within so many seconds: they may be half there. The next look finds them."""
    if isinstance(images, str):
        return images
    age_us = pc.subtract(pa.scalar(int(time.time() * 1e6)), images["modified"].cast(pa.int64()))
    young = pc.and_(pc.greater_equal(age_us, 0), pc.less(age_us, int(seconds * 1e6)))  # a clock that is ahead hides nothing for ever
    return images.filter(pc.invert(pc.fill_null(young, False)))


def open_manifest(uri: str) -> Manifest:
    """The URI itself where it is Parquet that names images (scores and labels do, so that what failed can be fed back), else the
    manifest of the images of a place: whatever `raysal index` takes.

    Raises:
        InputError: There is neither.
    """
    _require(uri)
    images = _images(uri)
    if isinstance(images, pa.Table) and not images.num_rows:
        raise InputError(f"{uri}: holds no image ({', '.join(IMAGES)}) and no manifest")
    return images


def _images(uri: str, on_unreadable: Callable[[str], None] | None = None) -> Manifest:
    """As `open_manifest`, but there may be no images; with `on_unreadable` as in `rows_of`."""
    fs, path = open_fs(uri)
    with store_errors(uri):
        if fs.isfile(path):  # a page of links counts as one
            with fs.open(path, "rb") as file:
                table = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
        else:
            names = list_names(uri)
            table = bool({RECORD, RUN} & {*names}) or any(name.endswith(".parquet") for name in names)
    return uri if table else rows_of(uri, on_unreadable)


def _require(uri: str) -> None:
    if not exists(uri):
        raise InputError(f"{uri}: does not exist; give a manifest.parquet, or a place with images, such as a folder")
