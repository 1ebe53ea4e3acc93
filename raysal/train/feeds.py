"""What a training step is fed: every image of the schedule is a numbered draw.

Draw ``d`` of a stream is image ``permutation(pass)[d mod n]``, augmented with a seed made from ``d`` alone. So a draw is the same pixels
whichever worker makes it, whenever, and a resumed training continues at draw ``step * batch`` without replaying anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset as TorchDataset

from raysal.config import Config
from raysal.datasets.augment import Augment, draw_seed
from raysal.datasets.base import Dataset, Item
from raysal.errors import DataError, ImageError

LabeledBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
UnlabeledBatch = tuple[torch.Tensor, torch.Tensor]


@lru_cache(maxsize=8)
def permutation(n: int, seed: int, stream: str, pass_: int) -> np.ndarray:
    """Order of the n images in one pass: int64 [n]."""
    return np.random.default_rng(draw_seed(seed, f"{stream}/order", pass_)).permutation(n)


class Draws(TorchDataset):
    """Augmented images by draw number.

    Args:
        dataset: Reads pixels (its splits are not used).
        items: The images of this stream.
        cfg: Whole configuration (seed, augmentation, input scale).
        stream: Name of the stream; "labeled" also reads masks.
    """

    def __init__(self, dataset: Dataset, items: Sequence[Item], cfg: Config, stream: str) -> None:
        self.dataset, self.items, self.seed, self.stream = dataset, items, cfg.seed, stream
        self.augment = Augment(cfg.augment, cfg.data.input_scale)
        self.crop_px, self.augin = cfg.augment.crop_px, cfg.augment.augin > 0

    def item(self, draw: int) -> Item:
        pass_, place = divmod(draw, len(self.items))
        return self.items[permutation(len(self.items), self.seed, self.stream, pass_)[place]]

    def __getitem__(self, draw: int) -> LabeledBatch:
        """image uint8 [3, crop, crop], mask uint8 [crop, crop] (255: no label), valid bool [crop, crop]."""
        item = self.item(draw)
        other = self._read(self.item(draw + 1)) if self.augin else None
        seed = draw_seed(self.seed, self.stream, draw)
        found = self._read(item)
        if found is None:  # nothing to learn from: every pixel is marked as not valid
            blank = np.zeros((self.crop_px, self.crop_px, 3), np.uint8)
            return self.augment(blank, None, np.zeros(blank.shape[:2], bool), seed)
        image_HWC, valid_HW = found
        mask_HW = self.dataset.mask(item, valid_HW.shape) if self.stream == "labeled" else None
        return self.augment(image_HWC, mask_HW, valid_HW, seed, other[0] if other else None)

    def _read(self, item: Item) -> tuple[np.ndarray, np.ndarray] | None:
        """An image and its valid pixels; None for an unlabelled one that can't be read."""
        try:
            image_HWC = self.dataset.image(item)
            return image_HWC, self.dataset.valid(item, image_HWC.shape[:2])
        except ImageError as error:
            if self.stream == "labeled":
                raise DataError(f"labelled image {error}; restore the file, or start a new run without it") from error
            return None


def span(total: int, rank: int, world: int) -> range:
    """Places of one rank's share of ``total``: contiguous, and where it does not divide, shares differ by one."""
    return range(total * rank // world, total * (rank + 1) // world)


def most(total: int, world: int) -> int:
    """The largest share of any rank."""
    return -(-total // world)


def block_draws(
    block: int, blocks: int, first_step: int, end_step: int, batch: int, unit: int, world: int, steps_per_block: int
) -> list[int]:
    """Draws of one block of the unlabelled stream.

    Blocks go to the ranks in turn, and a block is some steps of one rank. So that a step is the same images on any number of workers,
    each rank's share of it is contiguous, as with labelled images. All steps of a block have room for the largest share; a draw of
    -1 is room that is not taken, as the splitter deals equal blocks.

    Args:
        block: Number of the block, from 0.
        blocks: How many there are; those that don't go round are empty.
        first_step: Step that the stream starts with.
        end_step: Steps of the schedule; later ones are left out.
        batch: Draws of a step over all ranks.
        unit: Draws that stay together: 2 where pairs are mixed.
        world: Ranks.
        steps_per_block: Steps in a block.
    """
    turn, rank = divmod(block, world)
    if turn >= blocks // world:
        return []
    mine, room = span(batch // unit, rank, world), most(batch // unit, world) * unit
    share = [*range(mine.start * unit, mine.stop * unit)]
    share += [-1] * (room - len(share))
    begin = first_step + turn * steps_per_block
    steps = range(begin, min(begin + steps_per_block, end_step))
    return [step * batch + place if place >= 0 else -1 for step in steps for place in share]


class _Batches:
    """Batches of draw numbers for one rank: of each global batch, its contiguous share."""

    def __init__(self, start_step: int, steps: int, batch: int, rank: int, world: int) -> None:
        self.start_step, self.steps, self.batch, self.mine = start_step, steps, batch, span(batch, rank, world)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.steps):
            yield [step * self.batch + place for place in self.mine]

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)


def loader(draws: Draws, start_step: int, steps: int, batch: int, rank: int, world: int, processes: int) -> DataLoader:
    """A seeded, cycled `DataLoader` over draws: yields batches of (image [b,3,s,s], mask [b,s,s], valid [b,s,s])."""
    return DataLoader(
        draws,
        batch_sampler=_Batches(start_step, steps, batch, rank, world),
        num_workers=processes,
        multiprocessing_context="forkserver" if processes else None,
        persistent_workers=bool(processes),
    )


def check_share(batch: int, world: int, name: str) -> None:
    """Raises DataError where a global batch leaves a worker without an image."""
    if batch < world:
        raise DataError(
            f"{name}={batch} leaves some of {world} workers without an image; raise it to {world}, or lower compute.train_workers"
        )
