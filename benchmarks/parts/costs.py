"""What scoring and labelling cost by image, by shard and in requests to a store: measured on the code itself, in one process, without Ray.

Each function of `MEASURES` measures the process that calls it, so `apart` gives each one of its own. Times are of the processor, which
other work on the machine hardly moves.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from parts.scenes import scenes, untrained
from raysal.archive.tables import labels_schema, scores_schema, write_table
from raysal.config import ScoreConfig, build
from raysal.images.masks import encode_mask
from raysal.labels import S5MARS
from raysal.plan import LARGEST_BLOCK
from raysal.stream.job import Job, prepare
from raysal.stream.label import LabelImages
from raysal.stream.manifest import read
from raysal.stream.output import INDEX, Output

Cost = dict[str, float]


def ids(images: int) -> Cost:
    """Reading the ids of a manifest, as each run begins: bytes of memory and seconds an image."""
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, images, 50_000):
            some = range(first, min(images, first + 50_000))
            columns = {"id": [f"{i:032x}" for i in some], "uri": [f"s3://archive/sol{i // 250:05d}/{i:09d}.jpg" for i in some]}
            write_table(f"{folder}/part-{first:09d}.parquet", pa.table(columns))
        with _taken(images) as cost:
            assert len(read(folder)[1]) == images
    return cost


def rows(images: int) -> Cost:
    """Finding out what a whole output holds, and marking it as whole again: bytes of memory and seconds an image."""
    key, n_shards = np.random.default_rng(0).permutation(np.arange(images, dtype=np.uint64)), -(-images // LARGEST_BLOCK)
    names = pa.array([f"part-{i:024x}.parquet" for i in range(n_shards)])
    with tempfile.TemporaryDirectory() as folder:
        output = Output(folder, labels_schema(S5MARS), {})
        token = output.claim(False)
        for name in names.to_pylist():
            Path(folder, name).touch()
        shard = pa.DictionaryArray.from_arrays(np.arange(images, dtype=np.int32) // LARGEST_BLOCK, names)
        numbers = {"status": np.zeros(images, np.int8), "time": np.arange(images), "abstained": np.zeros(images, np.float32)}
        write_table(f"{folder}/{INDEX}", pa.table({"shard": shard, "key": key, **numbers}))
        job = Job("", key, output, None)  # type: ignore[arg-type]  # what an actor does is not looked at
        del shard, numbers
        with _taken(images) as cost:
            held = output.held()
            assert not job.missing(held)[0].any()
            output.commit({}, held, token)
    return cost


def shards(count: int) -> Cost:
    """Looking into shards that no index tells of, as at the end of each run: seconds a shard."""
    schema = labels_schema(S5MARS)
    with tempfile.TemporaryDirectory() as folder:
        for n in range(count):
            block = [{"id": f"{n:016x}{i:016x}", "uri": f"{i}", "status": "ok"} for i in range(LARGEST_BLOCK)]
            write_table(f"{folder}/part-{n:024x}.parquet", pa.Table.from_pylist(block, schema=schema))
        with _taken(count) as cost:
            assert len(Output(folder, schema, {}).read().key) == count * LARGEST_BLOCK
    return cost


def requests(images: int) -> Cost:
    """Requests to S3 for an image, for its block, and for a shard that is looked into at the end; a server in this process counts them."""
    import fsspec
    from moto.server import ThreadedMotoServer

    schema, cfg, seen = labels_schema(S5MARS), build({"runtime": {"kind": "eager"}}), Counter[str]()
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").handlers = [_Counting(seen)]
    host, port = server.get_host_and_port()
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}", "key": "k", "secret": "s"}
    store = fsspec.filesystem("s3")
    store.mkdir("archive")
    with tempfile.TemporaryDirectory() as folder:
        for n, file in enumerate(scenes(Path(folder) / "scenes", images, 32)):
            store.put(file, f"s3://archive/raw/{n}.jpg")
        table = pa.table({"id": [f"{n:032x}" for n in range(images)], "uri": [f"s3://archive/raw/{n}.jpg" for n in range(images)]})
        job = prepare(LabelImages, table, untrained(Path(folder) / "model", 32), "s3://archive/out", schema, cfg, None)
        worker = LabelImages(dataclasses.replace(job.task, token=job.output.claim(False)))
    seen.clear()
    worker(table)
    work = seen.copy()
    job.output.read()
    server.stop()
    return {
        "image_reads": work["image"] / images,
        "block_reads": work["read"],
        "block_writes": work["written"],
        "shard_reads": seen["shard"] - work["shard"],
    }


def actor(px: int) -> Cost:
    """The process of a model actor at work on images of a size: bytes of memory at most, of its own and shared with others of its kind."""
    images = 2 * ScoreConfig().batch_size
    with tempfile.TemporaryDirectory() as folder:
        uris = scenes(Path(folder) / "scenes", images, px)
        table = pa.table({"id": [f"{n:032x}" for n in range(images)], "uri": uris})
        model = untrained(Path(folder) / "model", px, "resnet18")
        job = prepare(LabelImages, table, model, f"{folder}/out", labels_schema(S5MARS), build({}), None)
        LabelImages(dataclasses.replace(job.task, token=job.output.claim(False)))(table)
    shared = _memory("RssFile")
    return {"own": _memory("VmHWM") - shared, "shared": shared}


def written(px: int) -> Cost:
    """Bytes of a row of labels without its mask, of a mask (the exact ones of synthetic scenes of a size), and of a row of scores."""
    random, cfg = np.random.default_rng(0), ScoreConfig()
    with tempfile.TemporaryDirectory() as folder:
        files = [file.replace("/images/", "/masks/").replace(".jpg", ".png") for file in scenes(Path(folder), 16, px)]
        mask = sum(len(encode_mask(np.asarray(Image.open(file)))) for file in files) / len(files)
    common = {"status": "ok", "width": px, "height": px, "model_digest": "d" * 64}
    block = [{"id": random.bytes(16).hex(), "uri": f"s3://archive/sol{i // 250:05d}/{i:09d}.jpg", **common} for i in range(LARGEST_BLOCK)]
    labels = [r | {"class_fractions": random.random(S5MARS.n_classes), "source_sha256": random.bytes(32).hex()} for r in block]
    scores = [r | {n: random.random() for n in cfg.scores} | {"embedding": random.random(cfg.embedding_dim)} for r in block]
    return {
        "mask": mask,
        "label": _bytes(pa.Table.from_pylist(labels, schema=labels_schema(S5MARS))) / LARGEST_BLOCK,
        "score": _bytes(pa.Table.from_pylist(scores, schema=scores_schema(cfg.scores, cfg.embedding_dim, S5MARS))) / LARGEST_BLOCK,
    }


MEASURES: dict[str, Callable[[int], Cost]] = {
    "ids": ids,
    "rows": rows,
    "shards": shards,
    "requests": requests,
    "actor": actor,
    "written": written,
}


def apart(what: str, number: int) -> Cost:
    """One of `MEASURES` in a process of its own, on one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "parts.costs", what, str(number)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))  # servers greet


class _Counting(logging.Handler):
    """Counts a server's log: requests for an image; for the output, whether ``read`` or ``written``, and for a ``shard`` of it."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if "/raw/" in said:
            self.seen["image"] += 1
        elif "HTTP/1.1" in said:
            reads = "GET " in said or "HEAD " in said
            self.seen["read" if reads else "written"] += 1
            self.seen["shard"] += reads and "/out/part-" in said


@contextmanager
def _taken(things: int) -> Iterator[Cost]:
    """Fills in what a block took for each of some things: bytes of memory that it added at most, and seconds of the processor."""
    cost: Cost = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = _memory("VmRSS"), process_time()
    yield cost
    cost |= {"seconds": (process_time() - started) / things, "bytes": (_memory("VmHWM") - before) / things, "before": before}


def _memory(field: str) -> int:
    """Of this process in bytes: VmRSS is what it has, VmHWM what it had at most, RssFile what other processes can share."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def _bytes(table: pa.Table) -> int:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return len(file.getvalue())


if __name__ == "__main__":
    print(json.dumps(MEASURES[sys.argv[1]](int(sys.argv[2]))))
