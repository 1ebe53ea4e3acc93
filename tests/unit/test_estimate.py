"""`--dry-run`: its numbers add up, and it measures whatever a run itself would carry."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from raysal.datasets.base import Dataset, Item
from raysal.datasets.folder import read
from raysal.datasets.synthetic import write_archive
from raysal.errors import DataError
from raysal.rounds.choose import random_start
from raysal.rounds.estimate import Estimate, estimate
from tests.helpers import tiny

PLAN = Estimate(
    pool=1017, val=200, unlabeled=1500, budget=32, share_of_pool=32 / 1017, labels=(16, 24, 32), audit=30, trainings=3, steps=400,
    final_steps=800, evaluations=8, scorings=2, starts=7, train_step_s=0.2137, images_per_second=61.3, score_images_per_second=30.65,
    warnings=("odd",),
)  # fmt: skip
PART = re.compile(r"^(.*) = ([\d.]+) (s|min|h)$", re.MULTILINE)

SMALL = replace(PLAN, steps=4, final_steps=0, pool=60, val=3, starts=1)


@pytest.mark.parametrize("plan", [PLAN, SMALL], ids=["minutes", "seconds"])
def test_every_printed_part_multiplies_out_and_the_parts_add_up(plan: Estimate) -> None:
    text = plan.text()
    parts = [(what, float(amount), unit) for what, amount, unit in PART.findall(text)]
    (total, unit), *_ = re.findall(r"about ([\d.]+) (s|min|h) in all", text)
    assert sum(amount for _, amount, _ in parts) == pytest.approx(float(total), abs=1e-9)
    size = {"s": 1, "min": 60, "h": 3600}[unit]
    assert float(total) * size == pytest.approx(plan.total_s, abs=0.05 * size * len(parts))
    for what, amount, its_unit in parts:
        numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", what)]
        seconds = numbers[0] * numbers[1]
        if len(numbers) == 3:
            seconds = seconds * numbers[2] if what.endswith(" s") else seconds / numbers[2]
        elif "images/s" in what:
            seconds = numbers[0] / numbers[1]
        assert its_unit == unit
        assert seconds / size == pytest.approx(amount, rel=0.005, abs=0.06), what


def test_the_plan_names_its_rounds_and_every_part() -> None:
    text = PLAN.text()
    assert "labels after each round: round 0: 16, round 1: 24, round 2: 32" in text
    for part in (
        "warning: odd",
        "3 trainings",
        "last training, 800 steps",
        "8 evaluations",
        "2 scorings",
        "masks for 1017",
        "7 starts",
        "30 more random labels",
    ):
        assert part in text
    told = PLAN.to_dict()
    assert told["total_s"] == pytest.approx(sum(v for k, v in told.items() if k.endswith("_s") and k not in ("total_s", "train_step_s")))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes, of which the first three of the pool are cut short."""
    folder = tmp_path_factory.mktemp("estimate") / "archive"
    write_archive(str(folder), 10, 2, 32, 3)
    for image in sorted((folder / "images").glob("scene_*.jpg"))[:3]:
        image.write_bytes(image.read_bytes()[:300])
    return folder


def test_a_short_training_on_a_pool_with_damaged_images_is_measured(archive: Path, tmp_path: Path) -> None:
    cfg = tiny(
        tmp_path / "run",
        data={"reader": "folder", "root": str(archive)},
        train={"steps": 1, "eval_every": 1},
        loop={"initial": 3, "per_round": 1, "rounds": 1, "final_steps": 2},
    )
    plan = estimate(cfg)
    assert (plan.pool, plan.labels, plan.steps, plan.final_steps, plan.evaluations, plan.starts) == (10, (3, 4), 1, 2, 4, 5)
    assert plan.train_step_s > 0 and plan.images_per_second > 0
    assert any("3" in w and "can't be used" in w for w in plan.warnings)
    assert not (tmp_path / "run").exists()


def test_a_first_set_passes_over_images_whose_exclude_mask_is_gone(archive: Path, tmp_path: Path) -> None:
    """They could be bought, but a training would end at them."""
    pool = read(tiny("unused", data={"reader": "folder", "root": str(archive)}).data).split("train")
    gone = tuple(Item(i.name, i.image, i.mask, (str(tmp_path / "none.png"),)) if k in (4, 5) else i for k, i in enumerate(pool))
    dataset = Dataset("some", None, {"train": gone})  # type: ignore[arg-type]
    chosen = {row["uri"] for row in random_start(dataset, gone, 5, 0)}
    assert chosen == {i.image for k, i in enumerate(gone) if k not in (0, 1, 2, 4, 5)}
    with pytest.raises(DataError, match="6 images are to be chosen, but only 5"):
        random_start(dataset, gone, 6, 0)
