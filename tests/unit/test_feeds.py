"""Draws: the same pixels whoever makes them, whenever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from raysal.datasets.base import Dataset
from raysal.datasets.build import build
from raysal.errors import DataError
from raysal.labels import IGNORE
from raysal.train.feeds import Draws, loader, permutation, share
from tests.helpers import tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build(tiny("unused").data, str(tmp_path_factory.mktemp("feeds")))


@given(n=st.integers(1, 40), seed=st.integers(0, 2**31), pass_=st.integers(0, 5))
def test_every_pass_shows_every_image_once(n: int, seed: int, pass_: int) -> None:
    assert sorted(permutation(n, seed, "labeled", pass_).tolist()) == list(range(n))


def test_a_step_is_the_same_images_on_any_number_of_workers(dataset: Dataset) -> None:
    draws = Draws(dataset, dataset.split("train")[:5], tiny("unused"), "labeled")
    alone = list(loader(draws, 0, 3, 4, 0, 1, 0))
    for world in (2, 4):
        ranks = [list(loader(draws, 0, 3, 4, rank, world, 0)) for rank in range(world)]
        for step in range(3):
            for part in range(3):
                assert torch.equal(torch.cat([ranks[rank][step][part] for rank in range(world)]), alone[step][part])


def test_a_resumed_feed_goes_on_where_it_stopped(dataset: Dataset) -> None:
    draws = Draws(dataset, dataset.split("train")[:5], tiny("unused"), "labeled")
    whole, rest = list(loader(draws, 0, 6, 2, 0, 1, 0)), list(loader(draws, 4, 6, 2, 0, 1, 0))
    assert len(rest) == 2
    assert all(torch.equal(a, b) for x, y in zip(whole[4:], rest, strict=True) for a, b in zip(x, y, strict=True))


def test_another_seed_is_another_order_and_other_crops(dataset: Dataset) -> None:
    items = dataset.split("train")
    first, second = (Draws(dataset, items, tiny("unused", seed=s), "labeled") for s in (0, 1))
    assert [first.item(d).name for d in range(24)] != [second.item(d).name for d in range(24)]


def test_an_unlabelled_draw_carries_no_label(dataset: Dataset) -> None:
    _, mask, valid = Draws(dataset, dataset.split("train"), tiny("unused"), "unlabeled")[0]
    assert (mask == IGNORE).all() and valid.any()


def test_unlabelled_draws_never_open_a_mask(dataset: Dataset, tmp_path: Path) -> None:
    data = build(tiny("unused").data, str(tmp_path))
    before = [Draws(data, data.split("train"), tiny("unused"), "unlabeled")[d][0] for d in range(8)]
    for mask in (tmp_path / "data" / "masks").glob("*.png"):
        mask.unlink()
    after = [Draws(data, data.split("train"), tiny("unused"), "unlabeled")[d][0] for d in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_unreadable_unlabelled_image_has_no_valid_pixel_and_a_labelled_one_is_refused(tmp_path: Path) -> None:
    data = build(tiny("unused").data, str(tmp_path))
    items = data.split("train")[:1]
    Path(items[0].image).write_bytes(Path(items[0].image).read_bytes()[:100])
    _, _, valid = Draws(data, items, tiny("unused"), "unlabeled")[0]
    assert not valid.any()
    with pytest.raises(DataError, match=r"labelled image .*restore the file"):
        Draws(data, items, tiny("unused"), "labeled")[0]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(DataError, match=r"train\.batch_labeled=9 does not divide over 2 workers"):
        share(9, 2, "train.batch_labeled")
