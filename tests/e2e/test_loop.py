"""`raysal loop` as a user runs it: killed anywhere, it comes to the same end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from raysal.archive.tables import labels_schema, read_table
from tests.helpers import kill_when, processes, run, start, tiny_tree, write_config


def bought(folder: Path) -> list[list[str]]:
    """Ids bought in each round, in order of rank."""
    return [pq.read_table(p)["id"].to_pylist() for p in sorted(folder.glob("rounds/*/labels.parquet"))]


def markers(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.glob("rounds/*/stages/*.json"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    config = write_config(folder / "config.yaml", tiny_tree(folder / "run"))
    done = run("loop", "--config", str(config), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert [r["labels"] for r in result["rounds"]] == [3, 5]
    return folder


def test_every_pool_image_gets_one_mask_of_its_own_size(undisturbed: Path) -> None:
    table = read_table(str(undisturbed / "run" / "labels"))
    manifest = read_table(str(undisturbed / "run" / "manifest.parquet"))
    assert table.schema.names == labels_schema().names
    assert sorted(table["id"].to_pylist()) == sorted(manifest["id"].to_pylist())
    assert set(table["status"].to_pylist()) == {"ok"}
    assert set(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)) == {(32, 32)}


def test_no_label_is_bought_twice_and_the_ledger_is_whole(undisturbed: Path) -> None:
    rounds = bought(undisturbed / "run")
    everything = [i for ids in rounds for i in ids]
    assert [len(ids) for ids in rounds] == [3, 2]
    assert len(set(everything)) == 5
    stages = {Path(p).stem for p in markers(undisturbed / "run") if "000" in p}
    assert stages == {"choose", "buy", "train", "score"}
    assert (undisturbed / "run" / "report" / "index.html").stat().st_size > 10_000


def test_a_finished_run_repeats_nothing(undisturbed: Path) -> None:
    before = markers(undisturbed / "run")
    done = run("loop", "--config", str(undisturbed / "config.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert markers(undisturbed / "run") == before


def test_shuffled_labels_of_the_pool_change_no_query(undisturbed: Path, tmp_path: Path) -> None:
    """The same model and the same pool, but every mask that is not bought belongs to another image."""
    run_folder = tmp_path / "run"
    shutil.copytree(undisturbed / "run", run_folder)
    first = set(pq.read_table(run_folder / "rounds" / "000" / "labels.parquet")["name"].to_pylist())
    masks = [p for p in sorted((run_folder / "data" / "masks").glob("*.png")) if not any(Path(n).stem == p.stem for n in first)]
    contents = [p.read_bytes() for p in masks]
    for path, content in zip(masks, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    before = pq.read_table(run_folder / "rounds" / "001" / "chosen.parquet")["id"].to_pylist()
    for name in ("score", "choose"):
        (run_folder / "rounds" / ("000" if name == "score" else "001") / "stages" / f"{name}.json").unlink()
    shutil.rmtree(run_folder / "rounds" / "001")
    shutil.rmtree(run_folder / "rounds" / "000" / "scores")
    config = write_config(tmp_path / "config.yaml", tiny_tree(run_folder, train={"steps": 12}))
    done = run("loop", "--config", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert pq.read_table(run_folder / "rounds" / "001" / "chosen.parquet")["id"].to_pylist() == before


@pytest.mark.parametrize("moment", ["first training", "scoring", "second training", "masks"])
def test_a_killed_driver_goes_on_to_the_same_labels(undisturbed: Path, tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", tiny_tree(folder))
    reached = {
        "first training": lambda: any(folder.glob("rounds/000/train/fit/step-00000003/state.json")),
        "scoring": lambda: (folder / "rounds/000/stages/train.json").exists() and (folder / "rounds/000/scores").exists(),
        "second training": lambda: any(folder.glob("rounds/001/train/fit/step-00000006/state.json")),
        "masks": lambda: (folder / "labels").exists(),
    }[moment]
    kill_when(start("loop", "--config", str(config)), reached)
    kept = markers(folder)
    done = run("loop", "--config", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert bought(folder) == bought(undisturbed / "run")
    assert {k: v for k, v in markers(folder).items() if k in kept} == kept, "a finished stage was done again"
    last = [json.loads((f / "rounds/001/metrics.json").read_text())["checkpoint_digest"] for f in (folder, undisturbed / "run")]
    assert last[0] == last[1], "the resumed training came to another model"


def test_a_killed_scoring_actor_loses_and_doubles_nothing(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", tiny_tree(folder))
    process = start("loop", "--config", str(config))
    while not (folder / "rounds/000/stages/train.json").exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
    killed = []
    while not killed and process.poll() is None and not (folder / "rounds/000/stages/score.json").exists():
        for actor in processes("Scorer", process.pid)[:1]:
            actor.kill()
            killed.append(actor.pid)
    _, err = process.communicate(timeout=300)
    assert killed, "no scoring actor was seen"
    assert process.returncode == 0, err[-3000:]
    ids = read_table(str(folder / "rounds/000/scores"))["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 24 - 3
    assert bought(folder) == bought(undisturbed / "run")


def test_two_drivers_on_one_run_are_refused(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    config = write_config(tmp_path / "config.yaml", tiny_tree(tmp_path / "run"))
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = run("loop", "--config", str(config))
    assert refused.returncode == 2
    assert "another process is at work on this run" in refused.stderr


def test_a_run_begun_with_other_values_is_refused_and_names_them(undisturbed: Path) -> None:
    refused = run("loop", "--config", str(undisturbed / "config.yaml"), "--set", "optim.lr=0.5")
    assert refused.returncode == 2
    assert "optim.lr: was 0.001, now 0.5" in refused.stderr


def test_more_rounds_extend_a_finished_run(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed / "run", folder)
    tree = tiny_tree(folder)
    tree["loop"]["rounds"] = 2
    done = run("loop", "--config", str(write_config(tmp_path / "config.yaml", tree)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert bought(folder)[:2] == bought(undisturbed / "run")
    assert [len(ids) for ids in bought(folder)] == [3, 2, 2]
    assert yaml.safe_load((folder / "config.yaml").read_text())["loop"]["rounds"] == 2
