"""What the tasks of the unlabelled stream do.

torch is loaded by the first call: Ray's processes that only hand the stream on start seconds sooner.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from raysal.archive.uris import read_bytes

if TYPE_CHECKING:
    from raysal.train.feeds import Draws

FEED = "feed.json"
"""In a training's folder: at which step the stream begins, and for how many workers."""


@dataclass(frozen=True)
class Stream:
    """What a task must know.

    Attributes:
        draws: Reference of `Draws`, the unlabelled images.
        feed: URI of ``feed.json``.
        blocks, batch, unit, end_step: See `raysal.train.feeds.block_draws`.
        side: Of the crops, pixels.
        steps_per_block: By number of workers.
    """

    draws: Any
    feed: str
    blocks: int
    batch: int
    unit: int
    end_step: int
    side: int
    steps_per_block: dict[int, int]


def decode(numbers: dict[str, np.ndarray], stream: Stream) -> dict[str, np.ndarray]:
    """Images of some blocks.

    Args:
        numbers: ``id``, of the blocks: int64 [n].
        stream: Which images they are of.

    Returns:
        ``draw`` int64 [m], -1 where there is none; ``image`` uint8 [m, 3, side, side]; ``valid`` bool [m, side, side].
    """
    import torch

    from raysal.train.feeds import block_draws

    torch.set_num_threads(1)
    feed = json.loads(read_bytes(stream.feed))
    place = (stream.blocks, feed["first_step"], stream.end_step, stream.batch, stream.unit, feed["world"])
    wanted = [d for block in numbers["id"] for d in block_draws(int(block), *place, stream.steps_per_block[feed["world"]])]
    images = np.zeros((len(wanted), 3, stream.side, stream.side), np.uint8)
    valids = np.zeros((len(wanted), stream.side, stream.side), bool)
    draws = _cached(stream.draws)
    for i, draw in enumerate(wanted):
        if draw >= 0:
            image, _, valid = draws[draw]
            images[i], valids[i] = image.numpy(), valid.numpy()
    return {"draw": np.array(wanted, np.int64), "image": images, "valid": valids}


@lru_cache(maxsize=2)
def _cached(ref: Any) -> Draws:
    draws: Draws = ray.get(ref)
    return draws
