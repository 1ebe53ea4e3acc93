"""What an image is worth asking about: the query scores, as the method's equations state them.

Two branches give logits z_1, z_2 of shape [B, C, h, w]. With ::

    logp_k = log_softmax(z_k)                     H_k = -sum_c p_k logp_k
    logpm  = logaddexp(logp_1, logp_2) - ln 2     Hm  = -sum_c pm logpm
    JSD    = Hm - (H_1 + H_2) / 2

JSD is the Jensen-Shannon divergence of the branches and, equally, the BALD mutual information of a two-member ensemble,
so Hm = mean(H_k) + JSD: the entropy of the mean already holds the disagreement.

Nothing here can read a label: the only inputs are logits and the pixels known to be valid without labels.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raysal.config import ScoreConfig
from raysal.errors import ConfigError
from raysal.query.pooling import Measured, aggregate, shares

LN2 = math.log(2)
LOG_FLOOR = -104.0
"""exp underflows to 0 in float32 below it, so p * max(logp, LOG_FLOOR) is p logp with 0 log 0 = 0, even at logp = -inf."""


@dataclass(frozen=True)
class Branches:
    """The quantities that every score is made of, computed once.

    Args:
        z1_BChw: Logits of branch 1, any float type; the mathematics is float32.
        z2_BChw: Logits of branch 2.
        alpha: Weight a of disagreement against entropy in ``ueq_pixel``.
    """

    z1_BChw: Tensor
    z2_BChw: Tensor
    alpha: float = 0.5

    @property
    def classes(self) -> int:
        return self.z1_BChw.shape[1]

    @cached_property
    def logp(self) -> tuple[Tensor, Tensor]:
        return log_probabilities(self.z1_BChw), log_probabilities(self.z2_BChw)

    @cached_property
    def logpm(self) -> Tensor:
        return torch.logaddexp(*self.logp) - LN2

    @cached_property
    def pm(self) -> Tensor:
        return self.logpm.exp()

    @cached_property
    def Hm(self) -> Tensor:
        return entropy(self.logpm)

    @cached_property
    def JSD(self) -> Tensor:
        logp1, logp2 = self.logp
        return (self.Hm - (entropy(logp1) + entropy(logp2)) / 2).clamp(0, LN2)

    @property
    def E(self) -> Tensor:
        """Entropy of the mean prediction, Hm / ln C: float32 [B, h, w] in [0, 1]."""
        return (self.Hm / math.log(self.classes)).clamp(0, 1)

    @property
    def U(self) -> Tensor:
        """Divergence of the branches, JSD / ln 2: float32 [B, h, w] in [0, 1]."""
        return self.JSD / LN2

    @property
    def differ(self) -> Tensor:
        """1[argmax z_1 != argmax z_2]: float32 [B, h, w]."""
        return (self.z1_BChw.argmax(1) != self.z2_BChw.argmax(1)).float()


def log_probabilities(z_BChw: Tensor) -> Tensor:
    """log_softmax over classes, in float32 whatever the autocast: [B, C, h, w]."""
    return functional.log_softmax(z_BChw.float(), dim=1)


def entropy(logp_BChw: Tensor) -> Tensor:
    """H = -sum_c p log p in nats, in [0, ln C]: float32 [B, h, w]."""
    return -(logp_BChw.exp() * logp_BChw.clamp_min(LOG_FLOOR)).sum(1)


MAPS: dict[str, Callable[[Branches], Tensor]] = {
    "entropy": lambda b: b.E,
    "uncertainty": lambda b: b.U,
    "least_confidence": lambda b: (1 - b.pm.amax(1)).clamp(0, 1),
    "margin": lambda b: (1 + b.pm.topk(2, dim=1).values.diff(dim=1)[:, 0]).clamp(0, 1),  # 1 - (pm_(1) - pm_(2))
    "disagreement": lambda b: b.differ,
    "ueq_pixel": lambda b: b.alpha * b.U + (1 - b.alpha) * b.E,
    "ueq_gated": lambda b: b.E * b.differ,
}
"""Pixel maps a(x) in [0, 1]; higher means more worth labelling."""

FROM_COLUMNS = {
    "random": (),
    "ueq": ("uncertainty", "entropy"),
    "ueq_product": ("uncertainty", "entropy"),
    "ueq_cascade": ("uncertainty", "entropy"),
}
"""Strategies that are computed at query time, and the columns they need; every other strategy is its own column."""


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names in order, each once.

    Raises:
        ConfigError: A name is no score column; the nearest valid one is given.
    """
    names, known = tuple(dict.fromkeys(names)), (*MAPS, "bald")
    for name in names:
        if name in FROM_COLUMNS:
            needs = ", ".join(FROM_COLUMNS[name]) or "no column"
            raise ConfigError(f"score.scores: {name!r} is computed when querying, from {needs}; list those instead")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid scores: {', '.join(known)}"
            raise ConfigError(f"score.scores: unknown score {name!r}; {hint}")
    return names


def needed_columns(strategy: str) -> tuple[str, ...]:
    """Score columns that a strategy reads, for example ``("uncertainty", "entropy")`` for ``ueq``.

    Raises:
        ConfigError: The strategy is unknown.
    """
    if strategy in FROM_COLUMNS:
        return FROM_COLUMNS[strategy]
    if strategy in MAPS or strategy == "bald":
        return (strategy,)
    raise ConfigError(f"query.strategy: unknown strategy {strategy!r}; valid: {', '.join((*FROM_COLUMNS, *MAPS, 'bald'))}")


def maps(z1_BChw: Tensor, z2_BChw: Tensor, names: Iterable[str], alpha: float = 0.5) -> dict[str, Tensor]:
    """Pixel maps of the named scores.

    Args:
        z1_BChw: Logits of branch 1.
        z2_BChw: Logits of branch 2.
        names: Keys of `MAPS`.
        alpha: Weight of disagreement against entropy in ``ueq_pixel``.

    Returns:
        float32 [B, h, w] in [0, 1] by name.
    """
    branches = Branches(z1_BChw, z2_BChw, alpha)
    return {name: MAPS[name](branches) for name in check_names(names)}


class Bald:
    """BALD over dropout passes: H(mean_t p^(t)) - mean_t H(p^(t)), in nats, for any number of passes in fixed memory.

    Houlsby et al., 2011; as Monte Carlo dropout by Gal et al., 2017. Only sums are kept: of p [B, C, h, w] and of H [B, h, w].
    """

    def __init__(self) -> None:
        self.passes = 0
        self._p_BChw: Tensor | None = None
        self._H_Bhw: Tensor | None = None

    def add(self, *z_BChw: Tensor) -> None:
        """Adds one pass: the logits of one head, or of several whose mean prediction is the pass's prediction."""
        logp = torch.stack([log_probabilities(z) for z in z_BChw]).logsumexp(0) - math.log(len(z_BChw))
        p, H = logp.exp().double(), entropy(logp).double()
        self._p_BChw = p if self._p_BChw is None else self._p_BChw + p
        self._H_Bhw = H if self._H_Bhw is None else self._H_Bhw + H
        self.passes += 1

    def map(self) -> Tensor:
        """Mutual information of prediction and weights: float32 [B, h, w] in [0, ln min(C, T)].

        Raises:
            ValueError: No pass was added.
        """
        if self._p_BChw is None or self._H_Bhw is None:
            raise ValueError("Bald.map before any Bald.add: add at least one pass")
        p, T = self._p_BChw / self.passes, self.passes
        H_of_mean = torch.special.entr(p).sum(1)
        most = math.log(min(p.shape[1], T)) if T > 1 else 0.0
        return (H_of_mean - self._H_Bhw / T).clamp(0, most).float()


def valid_at(valid_BHW: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Valid pixels at the logits' resolution: a cell counts where at least half of the pixels under it do. bool [B, h, w]."""
    if valid_BHW.shape[1:] == size_hw:
        return valid_BHW.bool()
    if bool(valid_BHW.all()):
        return valid_BHW.new_ones((valid_BHW.shape[0], *size_hw), dtype=torch.bool)
    return functional.interpolate(valid_BHW[:, None].float(), size=size_hw, mode="area")[:, 0] >= 0.5


def class_fractions(z1_BChw: Tensor, z2_BChw: Tensor, valid_BHW: Tensor) -> np.ndarray:
    """Share of the valid pixels that the mean prediction gives to each class: float64 [B, C]; all 0 without valid pixels."""
    return shares(_named(Branches(z1_BChw, z2_BChw).logpm, valid_at(valid_BHW, _size(z1_BChw)))).cpu().numpy()


def score_images(
    z1_BChw: Tensor,
    z2_BChw: Tensor,
    valid_BHW: Tensor,
    cfg: ScoreConfig,
    class_bonus_C: Sequence[float] | np.ndarray | Tensor | None = None,
    bald_Bhw: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """One float an image and score, of images that went through the network whole. Arguments and errors as `measure`.

    Returns:
        float64 [B] by score name, and ``class_fractions`` float64 [B, C].
    """
    found = measure(z1_BChw, z2_BChw, valid_BHW, cfg, class_bonus_C, bald_Bhw)
    scores = {name: aggregate(a_Bn, found.weight_Bn, cfg.aggregate, cfg.top_q) for name, a_Bn in found.maps.items()}
    return {name: value.cpu().numpy() for name, value in (scores | {"class_fractions": shares(found.named_BC)}).items()}


def measure(
    z1_BChw: Tensor,
    z2_BChw: Tensor,
    valid_BHW: Tensor,
    cfg: ScoreConfig,
    class_bonus_C: Sequence[float] | np.ndarray | Tensor | None = None,
    bald_Bhw: Tensor | None = None,
    share_BHW: Tensor | None = None,
) -> Measured:
    """The pixel maps that scores are made of.

    Args:
        z1_BChw: Logits of branch 1, at any resolution.
        z2_BChw: Logits of branch 2.
        valid_BHW: bool, at the image's own size; pixels known to be valid WITHOUT labels.
        cfg: Which scores, how pixels become one number, alpha.
        class_bonus_C: omega_c; pixel maps are multiplied by sum_c pm_c omega_c, which draws rare classes forward.
        bald_Bhw: The map of `Bald` for these images, needed where cfg.scores names ``bald``.
        share_BHW: float32, of tiles: how much of each pixel is theirs; None: all of it.

    Raises:
        ConfigError: A score is unknown.
        ValueError: ``bald`` is asked for without its map.
    """
    names = check_names(cfg.scores)
    branches = Branches(z1_BChw / cfg.temperature, z2_BChw / cfg.temperature, cfg.ueq_alpha)
    valid_Bhw = valid_at(valid_BHW, _size(z1_BChw))
    pixel_maps = {name: MAPS[name](branches) for name in names if name != "bald"}
    if "bald" in names:
        if bald_Bhw is None:
            raise ValueError("measure: 'bald' is asked for, but its map is not given")
        pixel_maps["bald"] = bald_Bhw
    if class_bonus_C is not None:
        omega = torch.as_tensor(class_bonus_C, dtype=torch.float32, device=z1_BChw.device)
        bonus_Bhw = torch.einsum("bchw,c->bhw", branches.pm, omega)
        pixel_maps = {name: a * bonus_Bhw for name, a in pixel_maps.items()}
    weight_Bhw = valid_Bhw.float()
    if share_BHW is not None:
        weight_Bhw = weight_Bhw * functional.interpolate(share_BHW[:, None], size=_size(z1_BChw), mode="area")[:, 0]
    plain = branches if cfg.temperature == 1 else Branches(z1_BChw, z2_BChw)
    named_BC = _named(plain.logpm, weight_Bhw)  # what the mask will show, whatever the temperature
    return Measured({name: pixel_maps[name].flatten(1) for name in names}, weight_Bhw.flatten(1), named_BC)


def rarity_bonus(images_C: np.ndarray) -> np.ndarray:
    """omega_c = 1 / sqrt(1 + n_c), n_c the labelled images that hold class c: float64 [C] in (0, 1]."""
    return 1.0 / np.sqrt(1.0 + np.asarray(images_C, dtype=np.float64))


def score_columns(cfg: ScoreConfig, strategy: str) -> tuple[str, ...]:
    """The columns that a scoring run writes: those asked for, then those that the strategy needs. Raises ConfigError."""
    return check_names((*cfg.scores, *needed_columns(strategy)))


def _named(logpm_BChw: Tensor, weight_Bhw: Tensor) -> Tensor:
    classes = logpm_BChw.shape[1]
    named_BNC = functional.one_hot(logpm_BChw.argmax(1).flatten(1), classes) * weight_Bhw.flatten(1)[..., None].double()
    return named_BNC.sum(1)


def _size(z_BChw: Tensor) -> tuple[int, int]:
    return z_BChw.shape[2], z_BChw.shape[3]
