"""What one actor does with a block of manifest rows: fetch, decode, run, write the shard, give a receipt.

Whatever goes wrong with one image becomes its row. Subclasses say what is computed (`PoolWorker.rows`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raysal.archive.fetch import fetch_image, fetch_label
from raysal.archive.tables import write_table
from raysal.archive.uris import join, open_fs, read_record, remove_tree, write_bytes
from raysal.config import Config
from raysal.datasets.base import read_valid
from raysal.errors import CheckpointError, ImageError, RaysalError, ResourceError
from raysal.images.decode import decode
from raysal.model.engines import EAGER, Runtime
from raysal.model.runtime import Predictor

RUN = "_RUN.json"
"""In an output folder: whose rows it holds, and the token of the run that works on it."""

STATUSES = ("ok", "fetch", "decode", "limit", "model")
"""What can become of an image, as in the tables' ``status``."""

READERS = 8
"""Threads of an actor that fetch and decode ahead of the network; they wait far more than they work."""

FORWARD_PIXELS = 8 * 2**20
"""Pixels of one forward pass at most, whatever the batch size; a larger image goes alone."""

AHEAD_PIXELS, AHEAD_BYTES = 24 * 2**20, 64 * 2**20
"""Largest image and file that threads read ahead of the network; a larger one is read when its turn comes, so that one is in memory."""

HELD_BATCHES, HELD_PIXELS = 4, 64 * 2**20
"""Decoded images an actor holds, in batches: where an archive has many sizes, batches go before they are full; and their pixels, at
four bytes each, once among those that were read ahead and once among those that wait."""

PLAIN_ATTEMPTS = 2
"""Deaths over one block after which it is done image by image, to find the one that kills."""

DEADLY = 2
"""Deaths over one image after which it is passed over: one may be chance, as where a node is taken away."""

Row = dict[str, Any]
"""A row of the output table by column; columns left out are null."""


@dataclass(frozen=True)
class Task:
    """What actors need to know; small, as it is sent to each of them.

    Attributes:
        cfg: The run's configuration.
        checkpoint_uri: Where the model is.
        model_digest: What it must be: a checkpoint overwritten while the run goes on must not mix two models in one output.
        out_uri: Folder of the shards.
        schema: Of the output table.
        device: Where the model runs.
        threads: torch threads of an actor.
        token: Of the run; a process that outlived its run must not write into the next one's output.
        class_bonus: omega_C of the scores, None without.
        runtime: What computes the network.
    """

    cfg: Config
    checkpoint_uri: str
    model_digest: str
    out_uri: str
    schema: pa.Schema
    device: str
    threads: int
    token: str
    class_bonus: tuple[float, ...] | None = None
    runtime: Runtime = EAGER


@dataclass(frozen=True)
class Source:
    """A manifest row: what is known of an image before it is fetched."""

    id: str
    uri: str
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """An image ready to run.

    Attributes:
        source: Where it came from.
        image_HWC: uint8 RGB.
        valid_HW: bool; pixels known to be valid without labels.
        sha256: Hex digest of the file's bytes.
    """

    source: Source
    image_HWC: np.ndarray
    valid_HW: np.ndarray
    sha256: str

    @property
    def id(self) -> str:
        return self.source.id

    @property
    def name(self) -> str:
        return self.source.uri

    @property
    def shape_HW(self) -> tuple[int, int]:
        return self.valid_HW.shape[0], self.valid_HW.shape[1]


class PoolWorker:
    """The callable that Ray Data keeps in each actor: a block of manifest rows in, a receipt out.

    Args:
        task: What to do; the model is loaded once.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.cfg = task, task.cfg
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._refusal: RaysalError | None = None
        try:
            self.start()
        except RaysalError as error:
            self._refusal = error  # goes with the first receipt; raised here, it would only make Ray try again

    def serves(self, task: Task) -> bool:
        """Whether this is the worker of another run's task, too: the same model, for the same output."""
        return self._refusal is None and replace(self.task, token=task.token) == task

    def start(self) -> None:
        """Loads the model.

        Raises:
            CheckpointError: The checkpoint can't be used, or is no longer the one that the run began with.
        """
        # Ray sets OMP_NUM_THREADS to the logical CPUs of an actor, which are a share for scheduling, not the cores it may use.
        torch.set_num_threads(self.task.threads)
        self.predictor = Predictor.load(self.task.checkpoint_uri, self.task.device, self.task.runtime)
        if self.predictor.digest != self.task.model_digest:
            raise CheckpointError(
                f"{self.task.checkpoint_uri}: the checkpoint changed while the run went on (digest {self.predictor.digest[:12]}, "
                f"at the start {self.task.model_digest[:12]}); run again, and train into another folder meanwhile"
            )

    def rows(self, pictures: Sequence[Picture]) -> list[Row]:
        """The output rows of images of one size, in order, without the columns that every row has."""
        raise NotImplementedError

    def common(self) -> Row:
        """Columns that every row of this run has, whatever became of the image."""
        return {}

    def __call__(self, block: pa.Table) -> pa.Table:
        """Works off a block.

        Args:
            block: Columns id, uri and perhaps exclude.

        Returns:
            One row: the shard's name, and how many rows it has of each status; or what is wrong with the run, by the name of
            its error and its message, as exceptions change their text on their way through Ray.
        """
        try:
            if self._refusal is not None:
                raise self._refusal
            shard, counts = self._shard(block)
        except RaysalError as error:
            return pa.table({"error": [type(error).__name__], "message": [str(error)]})
        return pa.table({"shard": [shard], **{status: [counts[status]] for status in STATUSES}})

    def tried(self, block: pa.Table) -> Tried:
        """Works off a block and keeps nothing: what it took. The first image is done once before, as first calls are slow."""
        if self._refusal is not None:
            raise self._refusal
        sources = _sources(block)
        self._work(sources[:1])
        started = time.perf_counter()
        found = self._work(sources)
        seconds = time.perf_counter() - started
        table = pa.Table.from_pylist([{**self.common(), **row} for row in found], schema=self.task.schema)
        file = io.BytesIO()
        pq.write_table(table, file, compression="zstd")
        read = sum(_size_of(source.uri) for source in sources)
        return Tried(dict(Counter(row["status"] for row in found)), seconds, read, len(file.getvalue()))

    def _shard(self, block: pa.Table) -> tuple[str, Counter[str]]:
        """Writes the rows of a block; their file and their number by status."""
        sources = _sources(block)
        shard = shard_name([s.id for s in sources], self.task.token)
        with Attempt(join(self.task.out_uri, f"_attempt-{shard_name([s.id for s in sources], '')}.json")) as attempt:
            found = self._work(sources) if attempt.plain else self._work_carefully(sources, attempt)
            common = self.common()
            table = pa.Table.from_pylist([{**common, **row} for row in found], schema=self.task.schema)
            require_token(self.task.out_uri, self.task.token)
            write_table(join(self.task.out_uri, shard), table)
        return shard, Counter(row["status"] for row in found)

    def _work(self, sources: Sequence[Source]) -> list[Row]:
        """A row for each source, in order. Images of one size run together; reading goes on while the network works."""
        done: dict[int, Row] = {}
        waiting: dict[tuple[int, int], list[tuple[int, Picture]]] = defaultdict(list)

        def run(shape_HW: tuple[int, int]) -> None:
            places, pictures = zip(*waiting.pop(shape_HW), strict=True)
            done.update(zip(places, self._run(pictures), strict=True))

        for place, picture in enumerate(self._read_ahead(sources)):
            if picture is None:
                picture = self._read(sources[place], math.inf, math.inf)
            assert picture is not None
            if isinstance(picture, ImageError):
                done[place] = failed(sources[place], picture.status, picture)
                continue
            waiting[picture.shape_HW].append((place, picture))
            if len(waiting[picture.shape_HW]) >= self._batch(picture.shape_HW):
                run(picture.shape_HW)
            elif (
                sum(map(len, waiting.values())) >= HELD_BATCHES * self.cfg.score.batch_size
                or _pixels(p for held in waiting.values() for _, p in held) >= HELD_PIXELS
            ):
                run(max(waiting, key=lambda shape: len(waiting[shape])))
        for shape in list(waiting):
            run(shape)
        return [done[place] for place in range(len(sources))]

    def _work_carefully(self, sources: Sequence[Source], attempt: Attempt) -> list[Row]:
        """One image at a time, each noted before it is touched; those that killed a process are passed over."""
        found = []
        for source in sources:
            if source.id in attempt.deadly:
                error = f"{source.uri}: the process died over it (out of memory, or a decoder crashed); look at it by itself"
                found.append(failed(source, "model", error))
            else:
                attempt.note(source.id)
                found += self._work([source])
        return found

    def _run(self, pictures: Sequence[Picture]) -> list[Row]:
        """Rows of images of one size. Where a batch fails, its images run one by one, so that one costs only itself."""
        try:
            return [_whole(p.source, row, p.shape_HW) for p, row in zip(pictures, self.rows(pictures), strict=True)]
        except Exception as error:  # one image can't stop a run, whatever the network says to it
            if "CUDA error" in str(error):  # the accelerator's state is lost, and no image's fault
                raise
            if len(pictures) > 1:
                return [row for p in pictures for row in self._run([p])]
            return [failed(pictures[0].source, "model", f"{pictures[0].source.uri}: {type(error).__name__}: {error}")]

    def _batch(self, shape_HW: tuple[int, int]) -> int:
        return max(1, min(self.cfg.score.batch_size, FORWARD_PIXELS // (shape_HW[0] * shape_HW[1])))

    def _read_ahead(self, sources: Iterable[Source]) -> Iterator[Picture | ImageError | None]:
        """Images in order, read by threads that stay at most two batches ahead: memory holds for blocks of any length."""
        ahead: deque[Future[Picture | ImageError | None]] = deque()
        for source in sources:
            ahead.append(self._readers.submit(self._read, source, AHEAD_PIXELS, AHEAD_BYTES))
            while len(ahead) > 2 * self.cfg.score.batch_size or _pixels(f.result() for f in ahead if f.done()) > HELD_PIXELS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _read(self, source: Source, most_pixels: float, most_bytes: float) -> Picture | ImageError | None:
        """The image, or what is wrong with it; None where it is too large only for what is read ahead."""
        data = self.cfg.data
        max_pixels, max_bytes = int(min(data.max_pixels, most_pixels)), int(min(data.max_bytes, most_bytes))
        try:
            encoded = fetch_image(source.uri, max_bytes, data.max_seconds)
            label = partial(fetch_label, source.uri, max_seconds=data.max_seconds)
            found = decode(encoded, max_pixels, source.uri, label, data.max_bands, data.black_border)
            valid_HW = found.valid_HW & read_valid(source.exclude, found.valid_HW.shape, max_bytes, max_pixels)
        except ImageError as error:
            narrowed = most_pixels < data.max_pixels or most_bytes < data.max_bytes
            return None if error.status == "limit" and narrowed else error
        except ResourceError:
            raise  # no image's fault: the run stops and says what is missing
        except Exception as error:  # nothing that an image holds may stop the run
            return ImageError("decode", f"{source.uri}: {type(error).__name__}: {error}")
        return Picture(source, found.image_HWC, valid_HW, hashlib.sha256(encoded).hexdigest())


def _pixels(read: Iterable[object]) -> int:
    """Pixels of the pictures among what was read."""
    return sum(p.valid_HW.size for p in read if isinstance(p, Picture))


@dataclass(frozen=True)
class Tried:
    """What a sample of images took: statuses, seconds, bytes of files read, bytes of the rows that they would be."""

    counts: dict[str, int]
    seconds: float
    bytes_read: int
    bytes_written: int


def require_token(out_uri: str, token: str) -> None:
    """Raises RaysalError where the run with this token does not own an output any more."""
    if read_record(join(out_uri, RUN)).get("token") != token:
        raise RaysalError(f"{out_uri}: another run took this output over, or removed it; wait for that one, then run again")


def _sources(block: pa.Table) -> list[Source]:
    columns = block.to_pydict()
    exclude = columns.get("exclude") or [None] * len(columns["id"])
    return [Source(i, uri, tuple(e or ())) for i, uri, e in zip(columns["id"], columns["uri"], exclude, strict=True)]


def _size_of(uri: str) -> int:
    """Bytes of a file; 0 where that can't be known."""
    try:
        fs, path = open_fs(uri)
        return int(fs.size(path) or 0)
    except Exception:  # drivers raise their own types
        return 0


class Attempt:
    """Remembers, in a note beside the shards, that a block was begun: a block whose actors keep dying must end all the same.

    A note that is still there when a block begins tells of a death. Deaths happen to the innocent (a node is taken away), so
    a block is done as always once more; after that image by image, each named in the note before it is touched. An image over
    which `DEADLY` processes died is passed over from then on.

    Attributes:
        plain: Whether to work as always.
        deadly: Ids of images that are passed over.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        seen = read_record(uri)
        self._begun = seen.get("begun", 0) + 1
        self._deaths = Counter[str](seen.get("deaths", {}))
        if at := seen.get("at"):
            self._deaths[at] += 1
        self.deadly = {image for image, n in self._deaths.items() if n >= DEADLY}
        self.plain = self._begun <= PLAIN_ATTEMPTS

    def __enter__(self) -> Attempt:
        self.note(None)
        return self

    def note(self, at: str | None) -> None:
        """Writes down which image comes next."""
        state = {"begun": self._begun, "at": at, "deaths": self._deaths}
        write_bytes(self._uri, json.dumps(state).encode())

    def __exit__(self, *_: object) -> None:
        remove_tree(self._uri)


def shard_name(ids: Sequence[str], token: str) -> str:
    """The file of a block, from its ids and its run: done again in one run, a block replaces its own shard, and nobody else's."""
    return f"part-{hashlib.sha256(json.dumps([token, *ids]).encode()).hexdigest()[:24]}.parquet"


def failed(source: Source, status: str, error: object) -> Row:
    """The row of an image that could not be used."""
    return {"id": source.id, "uri": source.uri, "status": status, "error": str(error)}


def _whole(source: Source, row: Row, shape_HW: tuple[int, int]) -> Row:
    return {"id": source.id, "uri": source.uri, "status": "ok", "height": shape_HW[0], "width": shape_HW[1], **row}
