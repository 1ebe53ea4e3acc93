"""An export keeps account, leaves no half files, deletes nothing of others, and needs no more memory for a longer table."""

from __future__ import annotations

import csv
import http.server
import json
import os
import struct
import subprocess
import threading
import tracemalloc
import uuid
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysal.archive.tables import labels_schema, manifest_of, write_table
from raysal.archive.uris import list_names, read_bytes, write_bytes, write_stream
from raysal.errors import DataError, InputError
from raysal.export.run import FORMATS, OURS, export_labels
from raysal.images.masks import encode_mask
from raysal.labels import AI4MARS
from raysal.model.checkpoint import INFO
from tests.helpers import Call, kill_when, start
from tests.unit.exports import DIGEST, THREE, id_of, mask, put_labels, row

EVERY = pytest.mark.parametrize("format_", list(FORMATS))


@pytest.fixture
def labels(tmp_path: Path) -> str:
    """Two masks, and one image that could not be fetched."""
    return put_labels(str(tmp_path / "labels"), [row("/m/a.jpg", mask(0, 1)), row("/m/b.jpg", mask(255, 2)), row("/m/c.jpg")])


def files(folder: Path | str) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# --- what is written --------------------------------------------------------------------------------------------------


@EVERY
def test_every_format_counts_what_it_writes_and_leaves_out(tmp_path: Path, labels: str, format_: str) -> None:
    seen: list[tuple[int, int]] = []
    out = str(tmp_path / "out")
    done = export_labels(labels, format_, out, on_progress=lambda *n: seen.append(n))
    assert (done.written, done.left_out) == (2, {"fetch": 1}) and seen[-1] == (2, 2)
    account = json.loads((tmp_path / "out/export.json").read_text())
    assert account["finished"] and account["written"] == 2 and account["model_digests"] == [DIGEST]
    assert account["label_set"]["name"] == "three"
    assert set(list_names(out)) == {
        name.split("/")[0] for name in (*done.files, "export.json", "README.md" if format_ == "hf" else "export.json")
    }
    assert all((tmp_path / "out" / name).exists() for name in done.files)


@EVERY
def test_the_same_command_again_writes_the_same_bytes(tmp_path: Path, labels: str, format_: str) -> None:
    out = tmp_path / "out"
    export_labels(labels, format_, str(out))
    first = files(out)
    write_bytes(str(out / f"{next(iter(first))}.0123abcd.tmp"), b"left by a process that was killed")
    export_labels(labels, format_, str(out))
    assert files(out) == first


@EVERY
def test_any_store_takes_an_export(labels: str, tmp_path: Path, format_: str) -> None:
    """In an object store lie the bytes that lie on a disk; labels are read from there too."""
    there = f"memory://{uuid.uuid4().hex}"
    put_labels(f"{there}/labels", [row("/m/a.jpg", mask(0, 1)), row("/m/b.jpg", mask(255, 2)), row("/m/c.jpg")])
    export_labels(f"{there}/labels", format_, f"{there}/out")
    export_labels(labels, format_, str(tmp_path / "out"))
    for name, data in files(tmp_path / "out").items():
        if name != "export.json":  # it names the place
            assert read_bytes(f"{there}/out/{name}") == data, name


def test_names_lead_back_to_images(tmp_path: Path) -> None:
    uris = ["/m/x/a.jpg", "/m/y/a.jpg", '/m/x/=b, "c".jpg', "/m/x/火 星.jpg", "/m/x/d\r.jpg", "/m/x/e\nf,g.jpg"]
    labels = put_labels(str(tmp_path / "labels"), [row(u, mask(i % 3)) for i, u in enumerate(uris)])
    export_labels(labels, "png", str(tmp_path / "out"))
    with open(tmp_path / "out/names.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {(line["uri"], line["id"]) for line in lines} == {(u, id_of(u)) for u in uris}
    assert all((tmp_path / "out" / line["file"]).is_file() for line in lines)


def test_damaged_masks_are_left_out_and_counted(tmp_path: Path) -> None:
    good = row("/m/a.jpg", mask(0, 1))
    bad = [
        row("/m/b.jpg", mask(0, 1), mask_png=good["mask_png"][:30]),
        row("/m/c.jpg", mask(0, 1), width=7),
        row("/m/d.jpg", mask(0, 1), mask_png=None),
        row("/m/e.jpg", mask(0, 1), width=None),
        row("/m/f.jpg", mask(0, 1), mask_png=encode_mask(np.zeros((50, 50), np.uint8))),
    ]
    done = export_labels(put_labels(str(tmp_path / "labels"), [good, *bad]), "coco", str(tmp_path / "out"))
    assert (done.written, done.left_out) == (1, {"mask": 5})
    with pytest.raises(InputError, match="none of the 5 masks could be written"):
        export_labels(put_labels(str(tmp_path / "bad"), bad), "coco", str(tmp_path / "none"))


def test_only_the_images_of_another_table(tmp_path: Path, labels: str) -> None:
    class Item:
        id, image, exclude, group = id_of("/m/b.jpg"), "/m/b.jpg", (), ""

    class Unknown(Item):
        id = "0" * 32

    class Failed(Item):
        id = id_of("/m/c.jpg")

    only = str(tmp_path / "queue.parquet")
    write_table(only, manifest_of([Item(), Unknown(), Failed()]))
    done = export_labels(labels, "png", str(tmp_path / "out"), only=only)
    assert (done.written, done.left_out) == (1, {"fetch": 1})
    assert [w for w in done.warnings if "1 of the 3 ids" in w]
    write_table(only, manifest_of([Unknown()]))
    with pytest.raises(InputError, match="none of the images asked for"):
        export_labels(labels, "png", str(tmp_path / "out2"), only=only)


def test_labels_that_are_not_finished_are_exported_with_a_warning(tmp_path: Path, labels: str) -> None:
    os.unlink(f"{labels}/_SUCCESS")
    assert ["_SUCCESS" in w for w in export_labels(labels, "png", str(tmp_path / "out")).warnings] == [True]
    assert not export_labels(f"{labels}/part-0.parquet", "png", str(tmp_path / "one")).warnings


# --- the label set ----------------------------------------------------------------------------------------------------


def test_a_table_without_a_label_set_asks_for_one(tmp_path: Path) -> None:
    labels = put_labels(str(tmp_path / "labels"), [row("/m/a.jpg", mask(0, 2))], label_set=None)
    with pytest.raises(InputError, match=r"give --classes .*/model\.json"):
        export_labels(labels, "coco", str(tmp_path / "out"))
    for name, content in {"classes.json": THREE.to_dict(), INFO: {"label_set": THREE.to_dict()}}.items():
        (tmp_path / name).write_text(json.dumps(content))
        export_labels(labels, "coco", str(tmp_path / f"out-{name}"[:8]), classes=str(tmp_path / name))
        assert "Fels & Ger" in (tmp_path / f"out-{name}"[:8] / "annotations.json").read_text()


def test_files_of_different_label_sets_are_refused(tmp_path: Path, labels: str) -> None:
    write_table(f"{labels}/other.parquet", pa.Table.from_pylist([row("/m/z.jpg", mask(0))], schema=labels_schema(AI4MARS)))
    with pytest.raises(InputError, match=r"different label sets \('ai4mars' of 4 classes, 'three' of 3 classes\)"):
        export_labels(labels, "png", str(tmp_path / "out"))


def test_a_class_that_the_label_set_lacks_stops_the_export(tmp_path: Path) -> None:
    labels = put_labels(str(tmp_path / "labels"), [row("/m/a.jpg", mask(0, 7))])
    with pytest.raises(InputError, match=r"/m/a\.jpg holds class 7, but the label set 'three' ends at 2"):
        export_labels(labels, "png", str(tmp_path / "out"))


@pytest.mark.parametrize("text", [None, "no json", "[]", '{"classes": []}', '{"label_set": 3}'])
def test_a_label_set_that_cannot_be_read_is_named(tmp_path: Path, labels: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises((InputError, DataError), match=r"c\.json"):
        export_labels(labels, "png", str(tmp_path / "out"), classes=str(tmp_path / "c.json"))
    assert not (tmp_path / "out").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format_": "voc"}, "no format 'voc'; there are png, png-colour, coco, cvat, label-studio, hf"),
        ({"image_root": "/x"}, "--image-root goes with --format label-studio"),
        ({"with_images": True}, "--with-images goes with --format hf"),
        ({"out": "masks.zip"}, "is a folder"),
        ({"below": "/n"}, "does not lie below /n"),
        ({"labels": "nothing"}, "does not exist"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    tmp_path: Path, labels: str, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    given = {"labels": labels, "format_": "png", "out": str(tmp_path / "out")} | options
    with pytest.raises(InputError, match=words):
        export_labels(**given)
    assert files(tmp_path) == before


def test_tables_that_are_no_labels_or_hold_nothing_to_export_are_refused(tmp_path: Path, labels: str) -> None:
    write_table(str(tmp_path / "manifest.parquet"), manifest_of([]))
    with pytest.raises(InputError, match="a manifest table without column status"):
        export_labels(str(tmp_path / "manifest.parquet"), "png", str(tmp_path / "out"))
    with pytest.raises(InputError, match="no row with status ok to write \\(1 fetch\\)"):
        export_labels(put_labels(str(tmp_path / "failed"), [row("/m/c.jpg")]), "png", str(tmp_path / "out"))
    write_table(f"{labels}/again.parquet", pa.Table.from_pylist([row("/m/a.jpg", mask(0))], schema=labels_schema(THREE)))
    with pytest.raises(InputError, match="1 ids repeat"):
        export_labels(labels, "png", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@EVERY
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path, labels: str, format_: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis\.txt, which is no export"):
        export_labels(labels, format_, str(out))
    (out / "thesis.txt").unlink()
    export_labels(labels, format_, str(out))
    (out / "thesis.txt").write_text("mine")
    before = files(out)
    with pytest.raises(InputError, match=r"holds thesis\.txt"):
        export_labels(labels, format_, str(out))
    assert files(out) == before


def test_files_of_the_right_names_are_not_taken_for_an_export(tmp_path: Path, labels: str) -> None:
    (tmp_path / "out/masks").mkdir(parents=True)
    (tmp_path / "out/masks/drawn by hand.png").write_text("mine")
    with pytest.raises(InputError, match="holds masks"):
        export_labels(labels, "png", str(tmp_path / "out"))


def test_an_export_of_other_labels_or_format_is_not_replaced(tmp_path: Path, labels: str) -> None:
    other, out = put_labels(str(tmp_path / "other"), [row("/m/z.jpg", mask(0))]), str(tmp_path / "out")
    export_labels(labels, "png", out)
    for arguments in ((other, "png"), (labels, "png-colour")):
        with pytest.raises(InputError, match=f"holds the png export of {labels}"):
            export_labels(*arguments, out)


def test_an_export_into_the_labels_or_onto_a_file_is_refused(tmp_path: Path, labels: str) -> None:
    for out in (labels, f"{labels}/out"):
        with pytest.raises(InputError, match="lies in the labels"):
            export_labels(labels, "png", out)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        export_labels(labels, "png", str(tmp_path / "file"))


# --- cut short --------------------------------------------------------------------------------------------------------


@EVERY
def test_an_export_that_fails_half_way_leaves_no_final_file(tmp_path: Path, format_: str) -> None:
    rows = [row(f"/m/{i:03d}.jpg", mask(i % 3)) for i in range(70)]
    rows[-1] = row("/m/z.jpg", mask(0, 7))  # met in the last batch
    labels = put_labels(str(tmp_path / "labels"), rows, shards=1)
    for _ in range(2):  # the second finds what the first left
        with pytest.raises(InputError, match="holds class 7"):
            export_labels(labels, format_, str(tmp_path / "out"))
        left = {name.split("/")[0] for name in files(tmp_path / "out")}
        assert left <= {"export.json", "masks", "classes.json", "label-config.xml", "README.md"}
        assert not json.loads((tmp_path / "out/export.json").read_text())["finished"]
    rows[-1] = row("/m/z.jpg", mask(0, 1))
    put_labels(labels, rows, shards=1)
    assert export_labels(labels, format_, str(tmp_path / "out")).written == 70


def test_a_killed_export_leaves_no_final_file_and_the_same_command_finishes(tmp_path: Path) -> None:
    """It is killed while it waits for an image that never comes, with a file open for writing."""
    answers = threading.Event()

    class Mute(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.wait(300)
            super().do_GET()

        def do_HEAD(self) -> None:
            answers.wait(300)
            super().do_HEAD()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Mute, directory=str(tmp_path)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in "ab":
        Image.new("RGB", (2, 1)).save(tmp_path / f"{name}.png")
    uris = (f"{tmp_path}/a.png", f"http://127.0.0.1:{server.server_port}/b.png")
    labels = put_labels(str(tmp_path / "labels"), [row(uri, mask(0, 1)) for uri in uris], shards=1)
    out = tmp_path / "out"
    command = ("export", labels, "--format", "hf", "--with-images", "--out", str(out), "--json")
    process = start(*command)
    kill_when(process, lambda: (out / "data").is_dir() and bool(list((out / "data").glob("*.tmp"))))
    assert [p.suffix for p in (out / "data").iterdir()] == [".tmp"]
    answers.set()
    process = start(*command)
    said, errors = process.communicate(timeout=800)
    server.shutdown()
    assert process.returncode == 0, errors
    assert json.loads(said)["written"] == 2
    assert [p.name for p in (out / "data").iterdir()] == ["train-00000.parquet"]


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path: Path, labels: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        noise = np.random.default_rng(0)
        rows = [row(f"/m/{i}.jpg", noise.integers(0, 3, (300, 300), dtype=np.uint8)) for i in range(40)]
        big = put_labels(str(tmp_path / "big"), rows)
        for format_, big_file in {
            "coco": "annotations.json",
            "cvat": "cvat-0000.zip",
            "label-studio": "tasks-0000.json",
            "hf": "train-00000",
        }.items():
            with pytest.raises(InputError, match=rf"{big_file}.*no space left after \d+ bytes; free some and run"):
                export_labels(big, format_, str(small / format_))
            assert not [name for name in files(small / format_) if big_file in name or name.endswith(".tmp")]
            subprocess.run(["rm", "-r", str(small / format_)], check=True)
        with pytest.raises(InputError, match="no space left for"):
            export_labels(big, "png", str(small / "png"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_stream_shows_its_file_whole_or_not_at_all(root: str) -> None:
    with write_stream(f"{root}/a") as file:
        for _ in range(3):
            file.write(b"x" * 1000)
        if "://" not in root:
            assert "a" not in list_names(root)
    assert list_names(root) == ["a"] and read_bytes(f"{root}/a") == b"x" * 3000
    with pytest.raises(KeyError), write_stream(f"{root}/b") as file:
        file.write(b"x" * 1000)
        raise KeyError
    assert list_names(root) == ["a"]


# --- memory -----------------------------------------------------------------------------------------------------------


def padded(png: bytes, size: int) -> bytes:
    """The same PNG with a chunk of its own that no decoder looks at."""
    chunk = b"raYs" + bytes(size)
    return png[:33] + struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


@EVERY
def test_memory_does_not_grow_with_the_table(tmp_path: Path, format_: str) -> None:
    """One row group of 120 MB goes out, and never is half of it held: not while reading, and not at the end."""
    rows = [row(f"/m/{i}.jpg", mask(0, 1, 2)) for i in range(400)]
    table = pa.Table.from_pylist([r | {"mask_png": padded(r["mask_png"], 300_000)} for r in rows], schema=labels_schema(THREE))
    (tmp_path / "labels").mkdir()
    pq.write_table(table, tmp_path / "labels/all.parquet", use_dictionary=False, compression="none", write_batch_size=16)
    assert pq.ParquetFile(tmp_path / "labels/all.parquet").num_row_groups == 1
    del table, rows
    before, arrow, python = pa.total_allocated_bytes(), list[int](), list[int]()

    def look(_done: int, _total: int) -> None:
        arrow.append(pa.total_allocated_bytes() - before)
        python.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        export_labels(str(tmp_path / "labels"), format_, str(tmp_path / "out"), on_progress=look)
    finally:
        tracemalloc.stop()
    assert len(arrow) > 10
    assert max(arrow) < 60e6, f"arrow held {max(arrow) / 1e6:.0f} MB"
    assert max(python) - python[0] < 60e6, f"python held {(max(python) - python[0]) / 1e6:.0f} MB more than after the first batch"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_tells_what_it_did(tmp_path: Path, labels: str, raysal: Call) -> None:
    code, out, _ = raysal("export", labels, "--format", "coco", "--out", str(tmp_path / "out"))
    assert (code, out.strip()) == (0, f"coco {tmp_path}/out: 2 masks; left out: 1 fetch")
    code, out, err = raysal("export", labels, "--format", "label-studio", "--out", str(tmp_path / "ls"), "--json")
    assert code == 0 and json.loads(out)["left_out"] == {"fetch": 1}
    assert "warning: Label Studio can't open paths" in " ".join(err.split())


def test_the_command_ends_with_2_where_it_cannot_be_meant(tmp_path: Path, labels: str, raysal: Call) -> None:
    code, out, err = raysal("export", labels, "--format", "tiff", "--out", str(tmp_path / "out"))
    assert code == 2 and out == "" and "no format 'tiff'; there are png" in err
    assert raysal("export", labels, "--format", "png")[0] == 2


def test_every_format_says_what_it_may_delete_and_the_help_names_it(raysal: Call) -> None:
    assert FORMATS.keys() == OURS.keys()
    code, out, _ = raysal("export", "--help")
    assert code == 0 and "Example: raysal export" in out
    assert all(format_ in " ".join(out.split()) for format_ in FORMATS)
