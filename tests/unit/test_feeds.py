"""Draws: the same pixels whoever makes them, whenever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from raysal.datasets.augment import Augment, draw_seed
from raysal.datasets.base import Dataset
from raysal.datasets.build import build
from raysal.errors import DataError, ImageError
from raysal.images.masks import encode_mask
from raysal.labels import IGNORE
from raysal.train.feeds import Draws, _Batches, draw_at, loader, permutation, share
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


@pytest.mark.parametrize("damage", ["cut short", "another size", "gone"])
def test_an_unlabelled_image_whose_exclude_mask_is_damaged_has_no_valid_pixel(dataset: Dataset, tmp_path: Path, damage: str) -> None:
    exclude = tmp_path / "exclude.png"
    if damage != "gone":
        data = encode_mask(np.eye(32 if damage == "cut short" else 9, dtype=np.uint8))
        exclude.write_bytes(data[:-30] if damage == "cut short" else data)
    first, second = dataset.split("train")[:2]
    broken = replace(first, exclude=(str(exclude),))
    with pytest.raises(ImageError):
        dataset.valid(broken, (32, 32))
    image, mask, valid = Draws(dataset, [broken], tiny("unused"), "unlabeled")[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert (mask == IGNORE).all() and not valid.any()
    with pytest.raises(DataError, match=r"labelled image .*exclude\.png.*restore the file"):
        Draws(dataset, [broken], tiny("unused"), "labeled")[0]

    plain = Draws(dataset, [broken, second], tiny("unused"), "unlabeled")
    styled = Draws(dataset, [broken, second], tiny("unused", augment={"augin": 1.0}), "unlabeled")
    whole = next(d for d in range(4) if plain.item(d) == second and plain.item(d + 1) == broken)
    assert all(torch.equal(a, b) for a, b in zip(plain[whole], styled[whole], strict=True))  # a style that can't be read is none


@pytest.mark.parametrize("stream", ["labeled", "unlabeled"])
def test_augin_gives_a_draw_the_style_of_the_next_and_leaves_labels_and_valid_pixels(dataset: Dataset, stream: str) -> None:
    cfg = tiny("unused", augment={"augin": 1.0})
    plain, styled = (Draws(dataset, dataset.split("train"), c, stream) for c in (tiny("unused"), cfg))
    for d in range(4):
        (before, *labels), (after, *same) = plain[d], styled[d]
        assert not torch.equal(before, after)
        assert all(torch.equal(a, b) for a, b in zip(labels, same, strict=True))
        item = styled.item(d)
        image, style = dataset.image(item), dataset.image(styled.item(d + 1))
        valid = dataset.valid(item, image.shape[:2])
        expected = Augment(cfg.augment)(image, None, valid, draw_seed(cfg.seed, stream, d), style)[0]
        assert torch.equal(after, expected)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(DataError, match=r"train\.batch_labeled=9 does not divide over 2 workers"):
        share(9, 2, "train.batch_labeled")


def dealt(first_step: int, steps: int, batch: int, world: int, steps_per_block: int) -> list[list[list[int]]]:
    """Draws of each rank and step, where blocks of rows go to the ranks in turn."""
    share = batch // world
    rows = list(range(steps * batch))
    blocks = [rows[i : i + steps_per_block * share] for i in range(0, len(rows), steps_per_block * share)]
    mine = [[row for block in blocks[rank::world] for row in block] for rank in range(world)]
    draws = [[draw_at(row, first_step, batch, world, steps_per_block) for row in rows_r] for rows_r in mine]
    return [[d[i : i + share] for i in range(0, len(d), share)] for d in draws]


def loaded(first_step: int, steps: int, batch: int, world: int) -> list[list[list[int]]]:
    return [list(_Batches(first_step, first_step + steps, batch, rank, world)) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("steps_per_block", [1, 3, 8])
@pytest.mark.parametrize("first_step", [0, 1, 24])
def test_blocks_dealt_in_turn_give_each_rank_its_share_of_each_step(world: int, steps_per_block: int, first_step: int) -> None:
    share = 8 // world
    expected = [[list(range(s * 8 + r * share, s * 8 + (r + 1) * share)) for s in range(first_step, first_step + 24)] for r in range(world)]
    assert dealt(first_step, 24, 8, world, steps_per_block) == expected == loaded(first_step, 24, 8, world)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))
def test_any_blocks_deal_the_draws_of_a_loader(world: int, share: int, per_block: int, blocks: int, first_step: int) -> None:
    steps = per_block * blocks
    assert dealt(first_step, steps, share * world, world, per_block) == loaded(first_step, steps, share * world, world)
