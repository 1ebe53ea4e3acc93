"""Ray Train: the same result however it is interrupted, and clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray.data
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.experimental.internal_kv import _internal_kv_get
from safetensors.torch import save_file

from raysal import cluster
from raysal.archive.uris import join
from raysal.config import Config
from raysal.datasets.build import build
from raysal.errors import CheckpointError, ResourceError
from raysal.model import checkpoint
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.rounds.single import count_classes
from raysal.train import ray as ray_adapter
from raysal.train.evaluate import evaluate
from raysal.train.feeds import Draws, most, span
from raysal.train.logs import read_log
from raysal.train.plan import Plan
from raysal.train.ray import Trained, fit
from tests.helpers import processes, tiny


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


def of(plan: Plan, workers: int) -> Plan:
    """The same training on another number of workers."""
    compute = plan.cfg.compute.model_copy(update={"train_workers": workers})
    return replace(plan, cfg=plan.cfg.model_copy(update={"compute": compute}))


def starts(folder: Path) -> list[int]:
    """Steps from which a training was begun or taken up again."""
    return [r["start"] for r in read_log(str(folder)) if "start" in r]


@pytest.fixture(scope="module")
def undisturbed(ray_runtime, tmp_path_factory) -> tuple[Plan, Trained]:
    """A training on two workers."""
    run = tmp_path_factory.mktemp("undisturbed")
    plan = plan_of(tiny(run, compute={"train_workers": 2, "threads": 1}))
    return plan, fit(plan, str(run / "train"))


def test_one_worker_and_no_worker_train_the_same_model_even_in_turns(ray_runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second takes up what the first left: its bookkeeping torn, its newest checkpoint cut short. Weights of the encoder have a
    relative path, which workers with another working folder must find too."""
    plan = plan_of(tiny(tmp_path, compute={"train_workers": 1, "threads": 1}))
    save_file(TwoBranch(plan.cfg.model, 9, 5).branches[0].encoder.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    model = plan.cfg.model.model_copy(update={"encoder_weights": "weights.safetensors"})
    plan = replace(plan, cfg=plan.cfg.model_copy(update={"model": model}))
    alone = fit(plan, str(tmp_path / "one"))
    left = tmp_path / "none" / "fit"
    shutil.copytree(tmp_path / "one" / "fit" / "step-00000009", left / "step-00000009")
    shutil.copytree(alone.last, left / "step-00000012")
    with open(left / "step-00000012" / "model.safetensors", "r+b") as file:
        file.truncate(100_000)
    (left / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    assert digest(fit(of(plan, 0), str(tmp_path / "none"))) == digest(alone)
    assert starts(tmp_path / "none") == [9]
    assert digest(fit(of(plan, 0), str(tmp_path / "whole"))) == digest(alone)
    assert starts(tmp_path / "whole") == [0]


def test_a_killed_worker_is_replaced_and_the_model_is_the_same(undisturbed, tmp_path: Path) -> None:
    plan, trained = undisturbed
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            records = read_log(str(tmp_path / "train"))
            if any(r.get("step", 0) >= 8 for r in records):  # by now the checkpoint of step 3 is uploaded for certain
                for process in processes("RayTrainWorker", os.getpid())[:1]:  # of this run: others may train on this machine
                    process.kill()
                    killed.append(process.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    again = fit(plan, str(tmp_path / "train"))
    thread.join(10)
    assert killed, "the worker was gone before it could be killed"
    assert starts(tmp_path / "train")[0] == 0 and starts(tmp_path / "train")[-1] >= 3
    assert digest(again) == digest(trained)


def test_a_finished_training_is_not_repeated(undisturbed) -> None:
    plan, trained = undisturbed
    folder = str(Path(trained.checkpoint).parents[1])
    before = (Path(trained.checkpoint) / "model.safetensors").stat().st_mtime_ns
    assert digest(fit(of(plan, 0), folder)) == digest(trained)
    assert (Path(trained.checkpoint) / "model.safetensors").stat().st_mtime_ns == before


def test_another_configuration_does_not_continue_a_training(undisturbed) -> None:
    plan, trained = undisturbed
    other = replace(of(plan, 0), cfg=of(plan, 0).cfg.model_copy(update={"seed": 1}))
    with pytest.raises(CheckpointError, match="another configuration"):
        fit(other, str(Path(trained.checkpoint).parents[1]))


def test_two_workers_measure_what_one_process_measures(undisturbed) -> None:
    plan, trained = undisturbed
    alone = evaluate(Predictor.load(trained.checkpoint), plan.dataset, plan.val, 2)
    assert trained.metrics is not None
    assert np.array_equal(np.array(trained.metrics["confusion"]), alone.confusion.numpy())
    assert trained.metrics["miou"] == pytest.approx(alone.miou, abs=1e-6)
    records = read_log(str(Path(trained.checkpoint).parents[1]))
    assert [r["world"] for r in records if r.get("start") == 0] == [2]
    losses = [r for r in records if "loss" in r]
    assert [r["step"] for r in losses] == list(range(1, 13))
    assert all(np.isfinite(r["loss"]) and r["images_per_second"] > 0 and r["data_wait_s"] >= 0 and r["agreement"] for r in losses)


@pytest.mark.parametrize(("world", "first"), [(1, 0), (2, 0), (2, 5), (3, 2), (4, 3)])
def test_ray_hands_every_rank_its_share_of_every_step(ray_runtime, tmp_path: Path, world: int, first: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The draws of a step are the same on any number of workers, from any step on, to the last; here 4 workers were planned with."""
    monkeypatch.setattr(ray_adapter, "IMAGES_PER_BLOCK", 4)
    compute = {"train_workers": 4, "min_workers": 1}
    plan = plan_of(tiny(tmp_path, train={"batch_unlabeled": 4, "batch_labeled": 4, "steps": 9}, compute=compute))
    (tmp_path / "feed.json").write_text(json.dumps({"first_step": first, "world": world}))
    draws, room = Draws(plan.dataset, plan.unlabeled, plan.cfg, "unlabeled"), most(4, world) * plan.mixed
    got: dict[int, list[np.ndarray]] = {}

    def read(rank: int, shard: ray.data.DataIterator) -> None:
        batches = shard.iter_batches(batch_size=room, batch_format="numpy", drop_last=True)
        got[rank] = [batch["image"][batch["draw"] >= 0] for batch in batches]

    with cluster.data_context(ordered=True):
        shards = ray_adapter._unlabeled_dataset(plan, str(tmp_path)).streaming_split(world, equal=True)
        threads = [threading.Thread(target=read, args=pair) for pair in enumerate(shards)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for rank in range(world):
        assert len(got[rank]) == 9 - first
        for step, images in enumerate(got[rank], first):
            mine = [step * plan.unlabeled_batch + place * plan.mixed + k for place in span(4, rank, world) for k in range(plan.mixed)]
            assert np.array_equal(images, np.stack([draws[d][0].numpy() for d in mine])), (rank, step)


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


def test_elastic_workers_leave_a_cpu_for_decoding(ray_runtime, tmp_path: Path) -> None:
    """Two workers would fill the eight CPUs to the last, and wait for ever for images that nobody decodes."""
    cfg = tiny(tmp_path, train={"steps": 3}, compute={"train_workers": 2, "min_workers": 1, "cpus_per_worker": 4, "threads": 1})
    trained = fit(plan_of(cfg), str(tmp_path / "train"))
    assert trained.metrics is not None
    assert [r["world"] for r in read_log(str(tmp_path / "train")) if r.get("start") == 0] == [1]


def test_what_a_run_asks_a_cluster_for_stays_asked_for_until_it_has_it(ray_runtime) -> None:
    def asked() -> list[dict]:
        return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]")

    tick = get_or_create_autoscaling_coordinator().get_reserved_resources
    for priority in ("LOW", "HIGH"):
        with cluster._asked_for([{"CPU": 640.0}] * 2, priority):
            ray.get(tick.remote("anybody", True))  # Ray Data tells the autoscaler anew, as it does every 20 s
            assert asked().count({"CPU": 640.0}) == 2
        ray.get(tick.remote("anybody", True))
        assert {"CPU": 640.0} not in asked()
