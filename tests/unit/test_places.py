"""What may be named as an archive to score or label, and what a watch makes of it."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from PIL import Image

from raysal.archive.tables import manifest_schema, read_table, write_table
from raysal.config import Config, build
from raysal.datasets.synthetic import scene
from raysal.errors import InputError
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch
from raysal.stream import archive as archives
from raysal.stream.archive import label_archive, open_manifest
from raysal.stream.label import label_forecast, label_pool
from raysal.stream.worker import RUN, Attempt

MODEL = {"arch": "Unet", "encoder": "tu-mobilenetv3_small_050"}


def configured() -> Config:
    return build({"model": MODEL, "runtime": {"kind": "eager"}})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint."""
    folder, cfg = str(tmp_path_factory.mktemp("model")), configured()
    save(folder, TwoBranch(cfg.model, S5MARS.n_classes, 0), ModelInfo(S5MARS, cfg.model, 1.0, 32))
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of two images."""
    (tmp_path / "site").mkdir()
    for n in range(2):
        Image.fromarray(scene(0, n, 32)[0]).save(tmp_path / "site" / f"{n}.png")
    return tmp_path / "site"


def names(place: str | Path) -> list[str]:
    table = open_manifest(str(place))
    assert isinstance(table, pa.Table)
    return sorted(Path(uri).name for uri in table["uri"].to_pylist())


def test_an_output_inside_its_archive_hides_no_image(model: str, site: Path) -> None:
    out = str(site / "labels")
    assert label_pool(open_manifest(str(site)), model, out, configured()).done == 2
    shutil.copy(site / "0.png", site / "2.png")
    assert label_pool(open_manifest(str(site)), model, out, configured()).done == 1
    assert open_manifest(out) == out, "the table itself is one of images"


def test_what_can_be_indexed_can_be_labelled(site: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.write(site / "0.png", "sol 1/0.png")
    (tmp_path / "list.txt").write_text(f"{site}/1.png\n")
    assert names(site) == ["0.png", "1.png"]
    assert names(site / "1.png") == ["1.png"]
    assert names(tmp_path / "list.txt") == ["1.png"]
    assert [uri.partition("::")[0] for uri in open_manifest(str(tmp_path / "a.zip"))["uri"].to_pylist()] == ["zip://sol 1/0.png"]
    (tmp_path / "notes.doc").write_text("no image")
    with pytest.raises(InputError, match="is neither an image nor a list"):
        open_manifest(str(tmp_path / "notes.doc"))


def test_a_page_of_links_can_be_labelled(site: Path) -> None:
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert names(f"http://127.0.0.1:{server.server_port}/") == ["0.png", "1.png"]
        server.shutdown()


def test_one_image_named_twice_is_one_row(site: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{site}/1.png\n{site}/0.png\n{site}/./1.png\n")
    assert [Path(u).name for u in open_manifest(str(tmp_path / "list.txt"))["uri"].to_pylist()] == ["0.png", "1.png"]


def looks(monkeypatch: pytest.MonkeyPatch, *between: Callable[[], object]) -> None:
    """What happens while a watch rests; its clock goes on by an hour each time."""
    clock, acts = SimpleNamespace(now=1e9), iter(between)

    def sleep(_: float) -> None:
        clock.now += 3601
        next(acts)()

    monkeypatch.setattr(archives, "time", SimpleNamespace(time=lambda: clock.now, monotonic=lambda: clock.now, sleep=sleep))


def watched(model: str, site: Path, out: Path, said: list[str]) -> Iterator:
    return label_archive(str(site), model, str(out), configured(), lambda *_: None, said.append, every_s=60)


def test_a_watch_begins_with_an_empty_folder_but_not_with_none(
    model: str,
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox, said = tmp_path / "inbox", list[str]()
    with pytest.raises(InputError, match="does not exist"):
        next(watched(model, inbox, tmp_path / "labels", said))
    inbox.mkdir()
    looks(monkeypatch, lambda: shutil.copy(site / "0.png", inbox))
    assert next(watched(model, inbox, tmp_path / "labels", said)).done == 1
    assert said == []


def test_a_watch_goes_on_past_what_it_cannot_read_and_says_so_once(
    model: str,
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    os.mkfifo(site / "pipe.png")
    said = list[str]()
    looks(monkeypatch, lambda: None, lambda: shutil.copy(site / "0.png", site / "2.png"))
    found = list(islice(watched(model, site, tmp_path / "labels", said), 2))
    assert [(look.done, look.rows) for look in found] == [(2, 2), (1, 3)]
    assert len(said) == 1 and "pipe.png: is no regular file" in said[0]


def test_a_watch_asks_again_for_what_could_not_be_fetched(
    model: str,
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an hour, and then after two more. What can't be decoded is not tried again."""
    (site / "broken.png").write_bytes(b"no image")
    looks(monkeypatch, lambda: None, lambda: shutil.copy(site / "1.png", site / "late.png"), lambda: None)
    rows = {f"{n:032x}": str(site / name) for n, name in enumerate(("0.png", "late.png", "broken.png"))}
    table = pa.table({"id": [*rows], "uri": [*rows.values()]})
    write_table(str(tmp_path / "manifest.parquet"), table)
    found = list(islice(watched(model, tmp_path / "manifest.parquet", tmp_path / "labels", []), 3))
    assert [look.done for look in found] == [3, 1, 1]
    assert [look.counts["fetch"] for look in found] == [1, 1, 0] and found[-1].counts["decode"] == 1


def test_who_finds_a_finished_output_and_nothing_to_do_does_not_claim_it(model: str, site: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    label_pool(open_manifest(str(site)), model, str(out), configured())
    owner = (out / RUN).read_bytes()
    assert label_pool(open_manifest(str(site)), model, str(out), configured(), retry_failed=True).done == 0
    assert (out / RUN).read_bytes() == owner


@pytest.mark.parametrize("name", ["_SUCCESS", "_trust.json", "_rows.pq", RUN])
def test_a_damaged_record_is_made_again_or_named(name: str, model: str, site: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    label_pool(open_manifest(str(site)), model, str(out), configured())
    whole = (out / name).read_bytes()
    (out / name).write_bytes(b"")
    if name == RUN:
        with pytest.raises(InputError, match="nobody knows the model"):
            label_pool(open_manifest(str(site)), model, str(out), configured())
        return
    shutil.copy(site / "0.png", site / "2.png")
    assert label_pool(open_manifest(str(site)), model, str(out), configured()).done == 1
    assert len((out / name).read_bytes()) >= len(whole) // 2
    assert len(read_table(str(out), ["id"])) == 3


def test_an_image_is_passed_over_only_once_two_processes_died_over_it(tmp_path: Path) -> None:
    note = str(tmp_path / "note.json")

    def dies_over(image: str | None) -> Attempt:
        attempt = Attempt(note).__enter__()
        attempt.note(image)
        return attempt

    assert [dies_over(None).plain for _ in range(2)] == [True, True]
    assert not dies_over("a").plain and not dies_over("b").deadly
    assert dies_over("a").deadly == set()
    last = dies_over("c")
    assert last.deadly == {"a"}
    last.__exit__()
    assert Attempt(note).plain and not Attempt(note).deadly


def test_a_forecast_reads_no_more_rows_than_it_tries(model: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raysal.stream import forecast as forecasts

    rows = [{"id": f"{n:032x}", "uri": str(site / f"{n % 2}.png")} for n in range(100)]
    read: list[int] = []
    monkeypatch.setattr(
        forecasts, "missing_rows", lambda *a, real=forecasts.missing_rows: (found := real(*a), read.append(found.num_rows))[0]
    )
    table = pa.Table.from_pylist(rows, schema=manifest_schema())
    found = label_forecast(table, model, str(tmp_path / "labels"), configured())
    assert (found.todo, found.sampled, read) == (100, 32, [32])
