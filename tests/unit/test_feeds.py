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
from raysal.train.feeds import Draws, _Batches, block_draws, check_share, loader, most, permutation
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


def test_a_batch_that_leaves_a_worker_without_an_image_is_refused() -> None:
    check_share(3, 3, "train.batch_labeled")
    with pytest.raises(DataError, match=r"train\.batch_labeled=3 leaves some of 4 workers without an image"):
        check_share(3, 4, "train.batch_labeled")


def dealt(first_step: int, end_step: int, pairs: int, unit: int, world: int, per_block: int, blocks: int) -> list[list[list[int]]]:
    """Draws of each rank and step, where blocks go to the ranks in turn, and a step takes the same number of rows on all of them."""
    made = [block_draws(block, blocks, first_step, end_step, pairs * unit, unit, world, per_block) for block in range(blocks)]
    room = most(pairs, world) * unit
    assert len({len(rows) for rows in made[: blocks // world * world][-world:]}) <= 1, "the last ones are equal too"
    rows = [[d for block in made[rank::world] for d in block] for rank in range(world)]
    return [[[d for d in mine[i : i + room] if d >= 0] for i in range(0, len(mine), room)] for mine in rows]


def loaded(first_step: int, end_step: int, batch: int, world: int) -> list[list[list[int]]]:
    return [list(_Batches(first_step, end_step, batch, rank, world)) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("steps_per_block", [1, 3, 8])
@pytest.mark.parametrize("first_step", [0, 1, 24])
def test_blocks_dealt_in_turn_give_each_rank_its_share_of_each_step(world: int, steps_per_block: int, first_step: int) -> None:
    share, end = 8 // world, first_step + 24
    expected = [[list(range(s * 8 + r * share, s * 8 + (r + 1) * share)) for s in range(first_step, end)] for r in range(world)]
    blocks = 24 // steps_per_block * world
    assert dealt(first_step, end, 4, 2, world, steps_per_block, blocks) == expected == loaded(first_step, end, 8, world)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(6, 20), st.integers(1, 7), st.integers(1, 40), st.integers(0, 10**6), st.integers(1, 60))
def test_any_blocks_deal_the_draws_of_a_loader(world: int, batch: int, per_block: int, blocks: int, first_step: int, steps: int) -> None:
    """Also where a batch does not divide, blocks are left over, and the schedule ends within a block or goes on after the last one."""
    end = min(first_step + steps, first_step + blocks // world * per_block)
    assert dealt(first_step, first_step + steps, batch, 1, world, per_block, blocks) == loaded(first_step, end, batch, world)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(6, 20), st.integers(1, 5))
def test_pairs_stay_together_and_every_draw_of_a_step_is_there_once(world: int, pairs: int, steps: int) -> None:
    ranks = dealt(0, steps, pairs, 2, world, 2, 2 * world * steps)
    for step in range(steps):
        shares = [mine[step] for mine in ranks]
        assert [d for share in shares for d in share] == list(range(step * 2 * pairs, (step + 1) * 2 * pairs))
        assert all(share[0] % 2 == 0 and len(share) % 2 == 0 for share in shares)
