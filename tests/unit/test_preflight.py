"""What a run would trip over later is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from raysal import cluster
from raysal.config import ComputeConfig, Config
from raysal.datasets.base import Dataset
from raysal.datasets.build import build, check
from raysal.errors import CheckpointError, ConfigError, DataError, ResourceError
from raysal.model.network import TwoBranch
from raysal.rounds import preflight as module
from raysal.rounds.preflight import preflight, preflight_rounds
from tests.helpers import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, str]:
    torch.set_num_threads(1)
    run = str(tmp_path_factory.mktemp("preflight") / "run")
    return build(tiny(run).data, run), run


@pytest.fixture
def begin(made: tuple[Dataset, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], None]:
    """Both checks on a machine that can carry anything."""
    monkeypatch.setattr(module.cluster, "score_actors", lambda compute: 1)
    dataset, _ = made

    def call(cfg: Config) -> None:
        preflight_rounds(cfg, dataset.split("train"), preflight(cfg, dataset))

    return call


def test_a_sound_configuration_passes(made: tuple[Dataset, str], begin: Callable[[Config], None]) -> None:
    begin(tiny(made[1]))


def test_encoder_weights_are_read_before_any_training(made: tuple[Dataset, str], begin: Callable[[Config], None]) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        begin(tiny(made[1], model={"encoder_weights": "/tmp/none.safetensors"}))


@pytest.mark.parametrize(
    ("sections", "error", "said"),
    [
        ({"score": {"scores": ("entrpy",)}}, ConfigError, "did you mean 'entropy'"),
        ({"query": {"batch": "kcenter"}, "score": {"embedding_dim": 0}}, ConfigError, "score.embedding_dim above 0"),
        ({"query": {"strategy": "bald"}, "model": {"dropout": 0.0}}, ConfigError, "bald needs dropout"),
        ({"data": {"unlabeled_split": "later"}}, DataError, "later"),
        (
            {"train": {"batch_unlabeled": 3, "batch_labeled": 4}, "compute": {"train_workers": 4}},
            DataError,
            "batch_unlabeled=3 leaves some of 4 workers",
        ),
        ({"loop": {"uncertainty_below": 0.1}, "score": {"aggregate": "sum"}}, ConfigError, "score.aggregate=mean"),
    ],
)
def test_what_would_end_a_run_after_its_first_training_is_refused(
    made: tuple[Dataset, str],
    begin: Callable[[Config], None],
    monkeypatch: pytest.MonkeyPatch,
    sections: dict,
    error: type[Exception],
    said: str,
) -> None:
    monkeypatch.setattr(cluster, "check_training", lambda compute: None)
    with pytest.raises(error, match=said):
        begin(tiny(made[1], **sections))


def test_bald_is_let_through_where_there_is_dropout(made: tuple[Dataset, str], begin: Callable[[Config], None]) -> None:
    begin(tiny(made[1], query={"strategy": "bald"}, model={"dropout": 0.2}))


def test_a_group_cap_that_no_round_could_keep_is_refused(made: tuple[Dataset, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.cluster, "score_actors", lambda compute: 1)
    cfg = tiny(made[1], query={"group_cap": 1}, loop={"per_round": 5})
    items = [replace(item, group="a") for item in made[0].split("train")]
    with pytest.raises(DataError, match="lets 1 images a round through"):
        preflight_rounds(cfg, items, TwoBranch(cfg.model, 9, 0))


def test_checkpoints_that_no_disk_holds_are_refused_with_the_numbers(
    made: tuple[Dataset, str], monkeypatch: pytest.MonkeyPatch, begin: Callable[[Config], None]
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**6}))
    with pytest.raises(ResourceError, match=r"needs about \d+\.\d\d GB for checkpoints, the disk has 0\.00 GB"):
        begin(tiny(made[1]))


def test_an_image_to_measure_on_that_is_cut_short_is_found_before_training(tmp_path: Path) -> None:
    cfg = tiny(tmp_path)
    dataset = build(cfg.data, cfg.run)
    victim = Path(dataset.split("val")[0].image)
    victim.write_bytes(victim.read_bytes()[:-200])
    with Image.open(victim) as picture:
        assert picture.size == (32, 32), "its header is whole"
    with pytest.raises(DataError, match=victim.name):
        check(dataset, ("train", "val"), pool={"train"})


def test_workers_that_fit_in_the_cluster_but_on_no_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": str(n), "Alive": True, "Resources": {"CPU": 3.0}} for n in range(4)]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    with pytest.raises(ResourceError, match=r"2 train workers, each of 4 CPU: .*room for only 0 such; lower compute\.cpus_per_worker"):
        cluster.check_training(ComputeConfig(train_workers=2, cpus_per_worker=4))
    cluster.check_training(ComputeConfig(train_workers=4, cpus_per_worker=2))


def test_a_frozen_encoder_of_random_numbers_is_refused(begin: Callable[[Config], None], made: tuple[Dataset, str]) -> None:
    for frozen in ({"optim": {"freeze_encoder": True}}, {"loop": {"frozen_rounds": 1, "rounds": 1}}):
        with pytest.raises(ConfigError, match=r"frozen encoder without model\.encoder_weights"):
            begin(tiny(made[1], **frozen))
