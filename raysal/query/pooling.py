"""From pixels to an image: how the pixel maps of a score become one number, of images seen whole or in tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysal.config import ScoreConfig
from raysal.errors import ConfigError

EMPTY = 1e-9
"""Weight of an image without valid pixels, so that its scores are 0 and not undefined."""


def aggregate(map_BHW: Tensor, weight_BHW: Tensor, how: str = "mean", q: float = 0.05) -> Tensor:
    """From pixels to an image.

    Args:
        map_BHW: A pixel map.
        weight_BHW: How much each pixel counts, 0 to 1: a bool where it is valid or not, a share where tiles overlap.
        how: ``mean``, ``sum``, or ``top_q`` (mean of the highest share q of valid pixels, at least one).
        q: The share of ``top_q``.

    Returns:
        float64 [B]. An image without valid pixels gets 0: there is nothing in it to label.

    Raises:
        ConfigError: ``how`` is none of the three.
    """
    a_BN, w_BN = map_BHW.double().flatten(1), weight_BHW.double().flatten(1)
    n_B = w_BN.sum(1)
    if how == "sum":
        return (a_BN * w_BN).sum(1)
    if how == "mean":
        return (a_BN * w_BN).sum(1) / n_B.clamp_min(EMPTY)
    if how == "top_q":
        return _mean_of_top(a_BN.masked_fill(w_BN == 0, -math.inf), w_BN, n_B, q)
    raise ConfigError(f"score.aggregate: unknown {how!r}; valid: mean, sum, top_q")


@dataclass(frozen=True)
class Measured:
    """Pixel maps of some images or tiles, and what their pixels count.

    Attributes:
        maps: float32 [B, n] by score name.
        weight_Bn: float32, 0 to 1.
        named_BC: float64, summed weight of the pixels that the mean prediction gives to each class.
    """

    maps: dict[str, Tensor]
    weight_Bn: Tensor
    named_BC: Tensor


class TileScores:
    """Scores of one image from its tiles, as `raysal.query.scores.score_images` gives them, tile by tile.

    Sums are float64 and in the order of the tiles, so that they do not depend on how many are measured at once. Memory does not grow with
    the image, but for ``top_q``, which keeps about that share of its pixels.

    Args:
        cfg: As in `raysal.query.scores.measure`.
        tiles: How many there will be.
    """

    def __init__(self, cfg: ScoreConfig, tiles: int) -> None:
        self.cfg, self.tiles = cfg, tiles
        self._n: Tensor | float = 0.0
        self._named_C: Tensor | float = 0.0
        self._sums: dict[str, Tensor] = {}
        self._top: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, tiles: Measured) -> None:
        """Adds some tiles of the image."""
        for k, w_n in enumerate(tiles.weight_Bn.double()):
            self._n, self._named_C = self._n + w_n.sum(), self._named_C + tiles.named_BC[k]
            for name, a_Bn in tiles.maps.items():
                a_n = a_Bn[k].double()
                if self.cfg.aggregate == "top_q":
                    self._keep(name, a_n[w_n > 0], w_n[w_n > 0], len(a_n))
                else:
                    self._sums[name] = self._sums.get(name, torch.zeros_like(a_n[0])) + (a_n * w_n).sum()

    def _keep(self, name: str, a_n: Tensor, w_n: Tensor, cells: int) -> None:
        """Keeps values, and from time to time of them those that can be among the top q of the whole image, whatever else it holds."""
        kept, most = self._top.setdefault(name, []), max(1.0, math.ceil(self.cfg.top_q * self.tiles * cells))
        kept.append((a_n, w_n))
        if sum(len(a) for a, _ in kept) > 3 * most:
            a_n, order_n = torch.cat([a for a, _ in kept]).sort(descending=True)
            w_n = torch.cat([w for _, w in kept])[order_n]
            needed_n = w_n.cumsum(0) - w_n <= most
            self._top[name] = [(a_n[needed_n], w_n[needed_n])]

    def scores(self) -> dict[str, np.ndarray]:
        """float64 [1] by score name, and ``class_fractions`` float64 [1, C]."""
        n_B, found = torch.as_tensor(self._n).reshape(1), {}
        for name, total in self._sums.items():
            found[name] = (total / (n_B.clamp_min(EMPTY) if self.cfg.aggregate == "mean" else 1.0)).reshape(1)
        for name, kept in self._top.items():
            a_n, w_n = (torch.cat(parts) for parts in zip(*kept, strict=True))
            found[name] = _mean_of_top(a_n[None], w_n[None], n_B, self.cfg.top_q)
        found["class_fractions"] = shares(torch.as_tensor(self._named_C)[None])
        return {name: value.cpu().numpy() for name, value in found.items()}


def shares(named_BC: Tensor) -> Tensor:
    """Each class's share of the pixels: [B, C]; all 0 where no pixel counts."""
    return named_BC / named_BC.sum(1, keepdim=True).clamp_min(EMPTY)


def _mean_of_top(a_BN: Tensor, w_BN: Tensor, n_B: Tensor, q: float) -> Tensor:
    """Mean of the highest values whose weights make up the share q of n, or 1; pixels that do not count are -inf."""
    k_B = torch.minimum((n_B * q).ceil().clamp_min(1), n_B)
    descending_BN, order_BN = a_BN.sort(1, descending=True)
    w_BN = w_BN.gather(1, order_BN)
    top_BN = (k_B[:, None] - (w_BN.cumsum(1) - w_BN)).clamp_min(0).minimum(w_BN)  # what of each pixel is among the highest k
    return (top_BN * descending_BN.nan_to_num(nan=math.nan, neginf=0.0)).sum(1) / k_B.clamp_min(EMPTY)
