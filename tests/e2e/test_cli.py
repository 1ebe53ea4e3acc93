"""Commands as a new user types them: what is refused says the file, what was wrong and what to do, with exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysal.archive.tables import read_table
from raysal.archive.uris import write_bytes
from raysal.errors import InputError
from tests.conftest import Said
from tests.helpers import run, tiny_tree, write_config


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "archive"
    done = run("synth", str(folder), "--images", "12", "--val-images", "3", "--size", "32", "--seed", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 12
    return folder


def config(folder: Path, root: Path, **sections: dict) -> Path:
    sections["data"] = {"reader": "folder", "root": str(root)} | sections.get("data", {})
    return write_config(folder / "config.yaml", tiny_tree(folder / "run", **sections))


@pytest.fixture
def refused(raysal: Callable[..., Said]) -> Callable[..., str]:
    """What a command that must be refused says."""

    def call(*arguments: str) -> str:
        done = raysal(*arguments)
        assert done.code == 2, (done.code, done.err[-2000:])
        assert "Traceback" not in done.err, done.err[-2000:]
        return done.err

    return call


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path, archive: Path, refused: Callable[..., str]) -> None:
    assert "did you mean 'train.steps'?" in refused("loop", "--config", str(config(tmp_path, archive)), "--set", "train.step=3")


def test_a_missing_config_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "can't be read" in refused("loop", "--config", str(tmp_path / "none.yaml"))


@pytest.fixture
def damaged(tmp_path: Path, archive: Path) -> Path:
    return Path(shutil.copytree(archive, tmp_path / "damaged"))


def test_bad_data_is_refused_before_any_training(tmp_path: Path, damaged: Path, refused: Callable[..., str]) -> None:
    """A missing mask, a mask of another size and a value outside the label set, each named in one message."""
    masks = sorted((damaged / "masks").glob("*.png"))
    masks[0].unlink()
    Image.fromarray(np.ones((8, 8), np.uint8)).save(masks[1])
    Image.fromarray(np.full((32, 32), 77, np.uint8)).save(masks[2])
    said = refused("loop", "--config", str(config(tmp_path, damaged)))
    assert masks[0].stem in said and "no mask" in said
    assert masks[1].name in said and "8 x 8" in said
    assert masks[2].name in said and "mask values [77] are not in label set" in said
    assert not (tmp_path / "run" / "config.yaml").exists(), "what is refused must leave nothing to trip over"


def test_encoder_weights_that_are_not_there_are_refused_before_any_training(
    tmp_path: Path, archive: Path, refused: Callable[..., str]
) -> None:
    said = refused("loop", "--config", str(config(tmp_path, archive)), "--set", f"model.encoder_weights={tmp_path}/none.safetensors")
    assert "none.safetensors" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_empty_split_is_refused(tmp_path: Path, damaged: Path, refused: Callable[..., str]) -> None:
    splits = json.loads((damaged / "splits.json").read_text())
    (damaged / "splits.json").write_text(json.dumps(splits | {"val": []}))
    assert "'val'" in refused("loop", "--config", str(config(tmp_path, damaged)))


def test_a_budget_over_the_pool_is_refused_with_the_numbers(tmp_path: Path, archive: Path, refused: Callable[..., str]) -> None:
    said = refused("loop", "--config", str(config(tmp_path, archive, loop={"initial": 10, "per_round": 2, "rounds": 2})))
    assert "10 + 2 x 2 = 14 labels" in said and "12 images" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_too_many_workers_are_refused_with_the_numbers(tmp_path: Path, archive: Path, refused: Callable[..., str]) -> None:
    said = refused("loop", "--config", str(config(tmp_path, archive, compute={"train_workers": 50})))
    assert "50 train workers" in said and "the cluster has 8" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_full_disk_is_refused_with_the_fix(tmp_path: Path, refused: Callable[..., str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        with pytest.raises(InputError, match="no space left for 1000000 bytes; free some"):
            write_bytes(str(small / "labels.parquet"), b"x" * 1_000_000)
        assert list(small.iterdir()) == []
        said = refused("synth", str(small / "archive"), "--images", "40", "--size", "64")
        assert "no space left" in said
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_dry_run_prints_the_plan_and_changes_nothing(tmp_path: Path, archive: Path, raysal: Callable[..., Said]) -> None:
    path = config(tmp_path, archive, loop={"initial": 3, "per_round": 2, "rounds": 2})
    done = raysal("loop", "--config", str(path), "--dry-run", "--json")
    assert done.code == 0, done.err[-2000:]
    plan = json.loads(done.out)
    assert (plan["pool"], plan["budget"], plan["trainings"], plan["steps"]) == (12, 7, 3, 12)
    assert plan["train_step_s"] > 0 and plan["total_s"] > 0
    assert not (tmp_path / "run").exists()


def test_train_evaluate_score_and_query_work_alone(
    tmp_path: Path, archive: Path, refused: Callable[..., str], raysal: Callable[..., Said]
) -> None:
    """One training on named labels, its evaluation, scores of a folder with a broken image, and a queue from them."""
    names = json.loads((archive / "splits.json").read_text())["train"][:4]
    (tmp_path / "names.txt").write_text("\n".join(names))
    path = config(tmp_path, archive, train={"steps": 3})
    done = raysal("train", "--config", str(path), "--labels", str(tmp_path / "names.txt"), "--json")
    assert done.code == 0, done.err[-3000:]
    trained = json.loads(done.out)
    assert trained["labels"] == 4
    again = raysal("train", "--config", str(path), "--labels", str(tmp_path / "names.txt"), "--json")
    assert json.loads(again.out) == trained
    assert "other labels" in refused("train", "--config", str(path))
    assert "begun by `raysal train`" in refused("loop", "--config", str(path))

    eager = ("--set", "runtime.kind=eager")  # as in training; other runtimes give a pixel another class here and there
    done = raysal("evaluate", trained["checkpoint"], str(archive), "--split", "val", *eager, "--json")
    assert done.code == 0, done.err[-3000:]
    measured = json.loads(done.out)
    assert measured["miou"] == pytest.approx(trained["miou"], abs=1e-6)
    assert measured["digest"] == trained["digest"]
    done = raysal("evaluate", trained["checkpoint"], str(archive), "--split", "val", "--json")
    assert done.code == 0, done.err[-3000:]
    assert json.loads(done.out)["miou"] == pytest.approx(trained["miou"], abs=1e-3)

    pool = Path(shutil.copytree(archive / "images", tmp_path / "pool"))
    broken = sorted(pool.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:200])
    done = raysal("score", trained["checkpoint"], str(pool), "--out", str(tmp_path / "scores"), "--config", str(path), "--json")
    assert done.code == 0, done.err[-3000:]
    counts = {k: v for k, v in json.loads(done.out)["counts"].items() if v}
    assert counts == {"ok": 14, "decode": 1}

    queue = str(tmp_path / "queue.parquet")
    done = raysal("query", str(tmp_path / "scores"), "--strategy", "ueq", "--budget", "5", "--out", queue, "--json")
    assert done.code == 0, done.err[-3000:]
    rows = read_table(queue)
    assert rows["rank"].to_pylist() == [1, 2, 3, 4, 5]
    assert broken.name not in " ".join(rows["uri"].to_pylist())
    scores = rows["score"].to_pylist()
    assert scores == sorted(scores, reverse=True)
    said = refused("query", str(tmp_path / "scores"), "--budget", "500", "--out", queue)
    assert "500 images are to be chosen, but only 14" in said

    said = refused("evaluate", trained["checkpoint"], str(archive), "--set", "data.label_set=marsscapes")
    assert "classes" in said or "label set" in said
    said = refused("evaluate", str(tmp_path / "pool"), str(archive))
    assert "checkpoint" in said


def test_an_unreadable_pool_image_becomes_a_row_and_the_run_goes_on(tmp_path: Path, damaged: Path, raysal: Callable[..., Said]) -> None:
    images = sorted((damaged / "images").glob("*"))
    train = set(json.loads((damaged / "splits.json").read_text())["train"])
    victim = next(p for p in images if p.stem in train or p.name in train)
    victim.write_bytes(victim.read_bytes()[:300])
    done = raysal("loop", "--config", str(config(tmp_path, damaged, train={"steps": 2}, loop={"initial": 2, "per_round": 1, "rounds": 1})))
    assert done.code == 0, done.err[-3000:]
    table = read_table(str(tmp_path / "run" / "labels"), ["uri", "status", "error"]).to_pylist()
    bad = [row for row in table if row["status"] != "ok"]
    assert len(table) == 12 and len(bad) == 1
    assert victim.name in bad[0]["uri"] and bad[0]["status"] == "decode" and bad[0]["error"]
