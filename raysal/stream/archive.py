"""An archive as a user names it, labelled once or as long as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from raysal.archive.entries import IMAGES
from raysal.archive.index import rows_of
from raysal.archive.uris import exists, open_fs, store_errors
from raysal.config import Config
from raysal.errors import CheckpointError, ConfigError, InputError, RaysalError
from raysal.stream.label import label_pool
from raysal.stream.manifest import Manifest
from raysal.stream.pool import Kept, Progress, Summary

PARQUET_MAGIC = b"PAR1"

SETTLED_S = 10.0
"""A file of a watched folder that is younger may still be being written."""


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
        place: Folder of images, or a manifest; read again each time.
        checkpoint_uri, out, cfg, retry_failed, replace: As in `raysal.stream.label.label_pool`.
        on_progress: As there.
        on_warning: Told of trouble that a next look may not meet.
        every_s: Seconds between looks; None looks once.

    Yields:
        What each look did; looks that found nothing new are passed over, but for the first.
    """
    first, kept = True, Kept()
    while True:
        try:
            images = open_manifest(place)
            if every_s is not None and isinstance(images, pa.Table):
                images = _settled(images, min(every_s, SETTLED_S))
            if isinstance(images, str) or images.num_rows:
                summary = label_pool(
                    images,
                    checkpoint_uri,
                    out,
                    cfg,
                    on_progress,
                    retry_failed=retry_failed and first,
                    replace=replace and first,
                    kept=kept,
                )
                if first or summary.done:
                    yield summary
                first = False
        except RaysalError as error:
            if every_s is None or isinstance(error, ConfigError | CheckpointError) or (first and exists(place)):
                raise
            on_warning(f"{error}; looking again in {every_s:g} s")
            first = False
        if every_s is None:
            return
        time.sleep(every_s)


def _settled(images: pa.Table, seconds: float) -> pa.Table:
    """Without files that were written within so many seconds: they may be half there. The next look finds them."""
    age_us = pc.subtract(pa.scalar(int(time.time() * 1e6)), images["modified"].cast(pa.int64()))
    young = pc.and_(pc.greater_equal(age_us, 0), pc.less(age_us, int(seconds * 1e6)))  # a clock that is ahead hides nothing for ever
    return images.filter(pc.invert(pc.fill_null(young, False)))


def open_manifest(uri: str) -> Manifest:
    """The URI itself where it is Parquet that names images (scores and labels do, so that what failed can be fed back), else the
    manifest of the images under a folder.

    Raises:
        InputError: There is neither.
    """
    if not exists(uri):
        raise InputError(f"{uri}: does not exist; give a manifest.parquet or a folder of images")
    fs, path = open_fs(uri)
    with store_errors(uri):
        if fs.isfile(path):
            with fs.open(path, "rb") as file:
                if file.read(len(PARQUET_MAGIC)) != PARQUET_MAGIC:
                    raise InputError(f"{uri}: is no Parquet file; give a manifest.parquet or a folder of images")
            return uri
        if any(p.endswith(".parquet") for p in fs.find(path)):
            return uri
    rows = rows_of(uri)
    if not rows.num_rows:
        raise InputError(f"{uri}: holds no image ({', '.join(IMAGES)}) and no manifest")
    return rows
