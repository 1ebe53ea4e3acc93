"""Ray Train: the same result however it is interrupted, and clear refusals."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from raysal.archive.uris import join
from raysal.config import Config
from raysal.datasets.build import build
from raysal.errors import CheckpointError, ResourceError
from raysal.model import checkpoint
from raysal.model.runtime import Predictor
from raysal.rounds.single import count_classes
from raysal.train.evaluate import evaluate
from raysal.train.logs import read_log
from raysal.train.plan import Plan
from raysal.train.ray import Trained, fit
from tests.helpers import tiny


def plan_of(cfg: Config, labeled: int = 3) -> Plan:
    dataset = build(cfg.data, cfg.run)
    pool = dataset.split("train")
    counts = count_classes(dataset, pool[:labeled])
    return Plan(
        cfg=cfg,
        dataset=dataset,
        labeled=pool[:labeled],
        unlabeled=pool[labeled:],
        val=dataset.split("val"),
        pixels=tuple(counts.sum(0).tolist()),
        images=tuple((counts > 0).sum(0).tolist()),
    )


def digest(trained: Trained) -> str:
    return checkpoint.digest_at(trained.checkpoint)


@pytest.fixture(scope="module")
def undisturbed(ray_runtime, tmp_path_factory) -> tuple[Plan, Trained]:
    run = tmp_path_factory.mktemp("undisturbed")
    plan = plan_of(tiny(run, compute={"train_workers": 1, "threads": 1}))
    return plan, fit(plan, str(run / "train"))


def test_one_worker_and_no_worker_train_the_same_model(undisturbed, tmp_path: Path) -> None:
    plan, trained = undisturbed
    local = Plan(**{**vars(plan), "cfg": plan.cfg.model_copy(update={"compute": plan.cfg.compute.model_copy(update={"train_workers": 0})})})
    assert digest(fit(local, str(tmp_path / "train"))) == digest(trained)


def test_a_killed_worker_is_replaced_and_the_model_is_the_same(undisturbed, tmp_path: Path) -> None:
    plan, trained = undisturbed
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            records = read_log(str(tmp_path / "train"))
            if any(r.get("step", 0) >= 8 for r in records):  # by now the checkpoint of step 3 is uploaded for certain
                for process in psutil.process_iter(["cmdline"]):
                    if any("RayTrainWorker" in part for part in process.info["cmdline"] or ()):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    again = fit(plan, str(tmp_path / "train"))
    thread.join(10)
    assert killed, "the worker was gone before it could be killed"
    starts = [r["start"] for r in read_log(str(tmp_path / "train")) if "start" in r]
    assert starts[0] == 0 and starts[-1] >= 3, starts
    assert digest(again) == digest(trained)


def test_a_finished_training_is_not_repeated(undisturbed) -> None:
    plan, trained = undisturbed
    folder = str(Path(trained.checkpoint).parents[1])
    before = (Path(trained.checkpoint) / "model.safetensors").stat().st_mtime_ns
    assert digest(fit(plan, folder)) == digest(trained)
    assert (Path(trained.checkpoint) / "model.safetensors").stat().st_mtime_ns == before


def test_bookkeeping_cut_short_by_a_kill_is_survived(undisturbed, tmp_path: Path) -> None:
    plan, trained = undisturbed
    (tmp_path / "train" / "fit").mkdir(parents=True)
    (tmp_path / "train" / "fit" / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    assert digest(fit(plan, str(tmp_path / "train"))) == digest(trained)


def test_another_configuration_does_not_continue_a_training(undisturbed) -> None:
    plan, trained = undisturbed
    other = plan.cfg.model_copy(update={"seed": 1, "compute": plan.cfg.compute.model_copy(update={"train_workers": 0})})
    folder = str(Path(trained.checkpoint).parents[1])
    (Path(folder) / "fit" / "local.json").write_text(json.dumps({"latest": Path(trained.checkpoint).name, "best": "", "best_miou": 0}))
    with pytest.raises(CheckpointError, match="another configuration"):
        fit(Plan(**{**vars(plan), "cfg": other}), folder)


def test_two_workers_measure_what_one_process_measures(ray_runtime, tmp_path: Path) -> None:
    plan = plan_of(tiny(tmp_path, compute={"train_workers": 2, "threads": 1}, train={"steps": 4, "checkpoint_every": 2}))
    trained = fit(plan, str(tmp_path / "train"))
    alone = evaluate(Predictor.load(trained.checkpoint), plan.dataset, plan.val, 2)
    assert trained.metrics is not None
    assert np.array_equal(np.array(trained.metrics["confusion"]), alone.confusion.numpy())
    assert trained.metrics["miou"] == pytest.approx(alone.miou, abs=1e-6)
    records = read_log(str(tmp_path / "train"))
    assert {r["world"] for r in records if "world" in r} == {2}
    losses = [r for r in records if "loss" in r]
    assert [r["step"] for r in losses] == [1, 2, 3, 4]
    assert all(np.isfinite(r["loss"]) and r["images_per_second"] > 0 and r["data_wait_s"] >= 0 and r["agreement"] for r in losses)


def test_a_pool_image_that_cannot_be_read_does_not_stop_training(ray_runtime, tmp_path: Path) -> None:
    cfg = tiny(tmp_path, train={"steps": 2})
    plan = plan_of(cfg)
    for item in plan.unlabeled[:5]:
        Path(item.image).write_bytes(b"not an image")
    trained = fit(plan, str(tmp_path / "train"))
    assert trained.metrics is not None and 0 <= trained.metrics["miou"] <= 1


def test_best_checkpoint_is_the_best_evaluated_one(ray_runtime, tmp_path: Path) -> None:
    cfg = tiny(tmp_path, loop={"checkpoint": "best"}, train={"steps": 6, "eval_every": 2, "checkpoint_every": 1})
    trained = fit(plan_of(cfg), str(tmp_path / "train"))
    evaluated = {r["step"]: r["eval"]["miou"] for r in read_log(str(tmp_path / "train")) if "eval" in r}
    step = checkpoint.read_info(trained.checkpoint).parents["step"]
    assert sorted(evaluated) == [2, 4, 6]
    assert evaluated[step] == max(evaluated.values())


def test_workers_that_no_cluster_can_carry_are_refused_with_the_numbers(ray_runtime, tmp_path: Path) -> None:
    plan = plan_of(tiny(tmp_path, compute={"train_workers": 64}))
    with pytest.raises(ResourceError, match=r"64 train workers x 1 CPUs \+ 0.5 for decoding = 64.5 CPUs, but the cluster has 8"):
        fit(plan, join(str(tmp_path), "train"))
