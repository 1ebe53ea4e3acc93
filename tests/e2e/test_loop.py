"""`raysal loop` as a user runs it: killed anywhere, it comes to the same end."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from raysal.archive.tables import labels_schema, read_table
from raysal.model.checkpoint import digest_at, read_info
from tests.conftest import Said
from tests.helpers import kill_when, processes, run, start, tiny_tree, write_config


def bought(folder: Path) -> list[list[str]]:
    """Ids bought in each round, in order of rank."""
    return [pq.read_table(p)["id"].to_pylist() for p in sorted(folder.glob("rounds/*/labels.parquet"))]


def markers(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.glob("rounds/*/stages/*.json"))}


def digests(folder: Path) -> list[str]:
    return [json.loads(p.read_text())["checkpoint_digest"] for p in sorted(folder.glob("rounds/*/metrics.json"))]


def models_of_masks(folder: Path) -> set[str]:
    return set(read_table(str(folder / "labels"))["model_digest"].to_pylist())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a process of its own, from nothing to its end."""
    folder = tmp_path_factory.mktemp("loop")
    config = write_config(folder / "config.yaml", tiny_tree(folder / "run"))
    done = run("loop", "--config", str(config), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r["labels"] for r in json.loads(done.stdout)["rounds"]] == [3, 5]
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
    assert [len(ids) for ids in rounds] == [3, 2]
    assert len({i for ids in rounds for i in ids}) == 5
    stages = {Path(p).stem for p in markers(undisturbed / "run") if "000" in p}
    assert stages == {"choose", "buy", "train", "score"}
    assert (undisturbed / "run" / "report" / "index.html").stat().st_size > 10_000


def test_a_finished_run_repeats_nothing(undisturbed: Path, raysal: Callable[..., Said]) -> None:
    before = markers(undisturbed / "run")
    done = raysal("loop", "--config", str(undisturbed / "config.yaml"))
    assert done.code == 0, done.err[-3000:]
    assert markers(undisturbed / "run") == before


def test_shuffled_labels_of_the_pool_change_no_query(undisturbed: Path, tmp_path: Path, raysal: Callable[..., Said]) -> None:
    """The same model and the same pool, but every mask that is not bought belongs to another image."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed / "run", folder)
    first = {Path(n).stem for n in pq.read_table(folder / "rounds" / "000" / "labels.parquet")["name"].to_pylist()}
    masks = [p for p in sorted((folder / "data" / "masks").glob("*.png")) if p.stem not in first]
    contents = [p.read_bytes() for p in masks]
    for path, content in zip(masks, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    before = bought(folder)
    (folder / "rounds" / "000" / "stages" / "score.json").unlink()
    shutil.rmtree(folder / "rounds" / "001")
    shutil.rmtree(folder / "rounds" / "000" / "scores")
    done = raysal("loop", "--config", str(write_config(tmp_path / "config.yaml", tiny_tree(folder))))
    assert done.code == 0, done.err[-3000:]
    assert bought(folder) == before


@pytest.mark.timeout(2400)
def test_killed_again_and_again_a_run_comes_to_the_same_end(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL of the driver in every kind of stage, of a scoring actor, and of a train worker."""
    folder = tmp_path / "run"
    config = str(write_config(tmp_path / "config.yaml", tiny_tree(folder, compute={"in_process": 0})))  # actors, too

    def reached(pattern: str) -> Callable[[], bool]:
        return lambda: any(folder.glob(pattern))

    kill_when(start("loop", "--config", config), reached("rounds/000/train/fit/step-00000003/state.json"))
    kill_when(start("loop", "--config", config), reached("rounds/000/scores/_attempt-*"))
    kept = [markers(folder)]

    # Now under Ray Train with a worker of its own: first an actor that scores, then the worker, then the driver.
    process = start("loop", "--config", config, "--set", "compute.train_workers=1")
    kill_one(process, "ScoreImages", lambda: not (folder / "rounds/000/stages/score.json").exists())
    wait_for(process, reached("rounds/001/train/fit/step-00000003/state.json"))
    kill_one(process, "RayTrainWorker", lambda: True)
    kill_when(process, reached("rounds/001/train/fit/step-00000009/state.json"))
    kept.append(markers(folder))

    kill_when(start("loop", "--config", config), lambda: (folder / "labels").exists())
    kept.append(markers(folder))
    done = run("loop", "--config", config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert bought(folder) == bought(undisturbed / "run")
    assert digests(folder) == digests(undisturbed / "run"), "a resumed training came to another model"
    for before in kept:
        assert {k: v for k, v in markers(folder).items() if k in before} == before, "a finished stage was done again"
    ids = read_table(str(folder / "labels"))["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 24


def kill_one(process: subprocess.Popen, title: str, still: Callable[[], bool]) -> None:
    """SIGKILLs one process of a command whose title holds a text, as soon as there is one."""
    while still():
        assert process.poll() is None, process.stderr.read()[-3000:]
        for victim in processes(title, process.pid)[:1]:
            victim.kill()
            psutil.wait_procs([victim], timeout=60)
            return
        time.sleep(0.01)
    raise AssertionError(f"no process {title!r} was seen")


def wait_for(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    while not reached():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.02)


def test_two_drivers_on_one_run_are_refused(tmp_path: Path, raysal: Callable[..., Said]) -> None:
    (tmp_path / "run").mkdir()
    config = write_config(tmp_path / "config.yaml", tiny_tree(tmp_path / "run"))
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = raysal("loop", "--config", str(config))
    assert refused.code == 2
    assert "another process is at work on this run" in refused.err


def test_a_run_begun_with_other_values_is_refused_and_names_them(undisturbed: Path, raysal: Callable[..., Said]) -> None:
    refused = raysal("loop", "--config", str(undisturbed / "config.yaml"), "--set", "optim.lr=0.5")
    assert refused.code == 2
    assert "optim.lr: was 0.001, now 0.5" in refused.err


def test_more_rounds_extend_a_finished_run(undisturbed: Path, tmp_path: Path, raysal: Callable[..., Said]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed / "run", folder)
    tree = tiny_tree(folder, loop={"rounds": 2}, query={})
    done = raysal("loop", "--config", str(write_config(tmp_path / "config.yaml", tree)))
    assert done.code == 0, done.err[-3000:]
    assert bought(folder)[:2] == bought(undisturbed / "run")
    assert [len(ids) for ids in bought(folder)] == [3, 2, 2]
    assert yaml.safe_load((folder / "config.yaml").read_text())["loop"]["rounds"] == 2
    assert models_of_masks(folder) == {digests(folder)[2]}

    # And back: the masks are those of the round that is the last one now.
    done = raysal("loop", "--config", str(write_config(tmp_path / "config.yaml", tiny_tree(folder))))
    assert done.code == 0, done.err[-3000:]
    assert models_of_masks(folder) == {digests(folder)[1]}


def test_a_typical_start_a_spread_batch_and_a_longer_last_training_run_to_the_end(tmp_path: Path, raysal: Callable[..., Said]) -> None:
    tree = tiny_tree(
        tmp_path / "run",
        loop={"cold_start": "typical", "warm_start": True, "final_steps": 3, "checkpoint": "best"},
        query={"strategy": "bald", "batch": "kcenter", "group_cap": 2},
        score={"bald_passes": 2, "class_bonus": True},
        train={"steps": 2, "eval_every": 1},
        cps={"ema": True},
    )
    done = raysal("loop", "--config", str(write_config(tmp_path / "config.yaml", tree)))
    assert done.code == 0, done.err[-3000:]
    final = tmp_path / "run/rounds/001/checkpoint-final"
    assert models_of_masks(tmp_path / "run") == {digest_at(str(final))}
    steps = [read_info(str(path)).parents["step"] for path in final.parent.glob("checkpoint-final*")]
    assert 3 in steps and set(steps) <= {1, 2, 3}, "the last and the best are kept"
    chosen = pq.read_table(tmp_path / "run/rounds/001/chosen.parquet")
    assert set(chosen["strategy"].to_pylist()) == {"bald"}
    assert "bald" in dict(chosen["reasons"].to_pylist()[0])
    assert len({i for ids in bought(tmp_path / "run") for i in ids}) == 5


def test_a_finished_run_is_audited_with_labels_it_never_learnt_from(undisturbed: Path, tmp_path: Path, raysal: Callable[..., Said]) -> None:
    folder = Path(shutil.copytree(undisturbed / "run", tmp_path / "run"))
    config = str(write_config(tmp_path / "config.yaml", tiny_tree(folder)))

    def audited(images: int) -> dict:
        done = raysal("loop", "--config", config, "--set", f"loop.audit={images}", "--json")
        assert done.code == 0, done.err[-3000:]
        found = json.loads((folder / "audit.json").read_text())
        assert json.loads(done.out)["audit"] == found["miou"] | {"images": images}
        return found

    first = audited(4)
    learnt = {i for ids in bought(folder) for i in ids}
    assert len(first["images"]) == 4 and not learnt & set(first["images"]) and first["population"] == 24 - 5
    assert set(first["iou"]) == set(json.loads((folder / "rounds/001/metrics.json").read_text())["iou"])
    marked = (folder / "rounds/001/stages/audit.json").stat().st_mtime_ns
    assert audited(4) == first and (folder / "rounds/001/stages/audit.json").stat().st_mtime_ns == marked
    trust = json.loads((folder / "labels" / "_trust.json").read_text())
    assert trust["audit"] == first and trust["val"]["abstention"] and trust["model_digest"] == first["model_digest"]
    assert "How good are the masks that nobody drew?" in (folder / "report" / "index.html").read_text()

    model = str(folder / "rounds/001/checkpoint")
    out = tmp_path / "audit.json"
    options = ("--learnt", str(folder), "--images", "4", "--out", str(out))
    done = raysal("audit", str(folder / "labels"), model, str(folder / "data"), *options)
    assert done.code == 0, done.err
    assert json.loads(out.read_text()) == first and "mIoU" in done.out and "random images" in done.out
    more = raysal("audit", str(folder / "labels"), model, str(folder / "data"), "--learnt", str(folder), "--images", "9", "--json")
    assert set(json.loads(more.out)["images"]) > set(first["images"])  # more of the same draw: earlier labels are not wasted
    names = tmp_path / "names.txt"
    asked = raysal("audit", str(folder / "labels"), model, str(folder / "data"), *options, "--ask", str(names))
    assert asked.code == 0 and len(names.read_text().split()) == 4
    (folder / "data" / "masks" / f"{names.read_text().split()[2]}.png").unlink()
    missing = raysal("audit", str(folder / "labels"), model, str(folder / "data"), *options)
    assert (
        missing.code == 2 and "1 of 4 images of this audit have no mask yet" in missing.err and names.read_text().split()[2] in missing.err
    )
    forgotten = raysal("audit", str(folder / "labels"), model, str(folder / "data"))
    assert forgotten.code == 2 and "learnt from 5 labels, 0 are named" in forgotten.err
    other = raysal("audit", str(folder / "labels"), str(folder / "rounds/000/checkpoint"), str(folder / "data"), *options)
    assert other.code == 2 and "masks of another model" in other.err


def test_a_target_that_is_met_ends_the_loop_early(tmp_path: Path, raysal: Callable[..., Said]) -> None:
    tree = tiny_tree(tmp_path / "run", loop={"target_miou": 0.0, "rounds": 3}, train={"steps": 1})
    done = raysal("loop", "--config", str(write_config(tmp_path / "config.yaml", tree)), "--json")
    assert done.code == 0, done.err[-3000:]
    result = json.loads(done.out)
    assert result["stopped"] == "target" and [r["labels"] for r in result["rounds"]] == [3]
    assert read_table(result["labels"]).num_rows == 24
