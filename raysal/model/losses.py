"""Supervised and cross pseudo-label losses of one branch.

Every loss runs in float32, whatever autocast says, reads a target of class ids with 255 = ignored, gives ignored pixels
no gradient, and gives 0 (still part of the graph, so that DDP finds every gradient) where nothing is labelled at all.

`wce`, `focal`, `dice` and `cross_pseudo` sum their numerators and denominators over all workers: one global batch has one
gradient, on however many workers it is spread and however unevenly its labels lie. `ohem` and `lovasz` sort pixels, which
does not split into sums: they are per worker, and DDP averages them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from raysal.config import LossConfig, LossName, WeightScheme
from raysal.labels import IGNORE


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * dist.get_world_size()


def global_sum(x: Tensor) -> Tensor:
    """Sum of a tensor over all DDP workers, whose gradient survives DDP's averaging.

    Every worker computes the same loss from the sum and each holds only its own pixels' share of the gradient. DDP averages
    the shares where they should be added, so backward multiplies by the number of workers. On one worker: the identity.
    Every worker must call it equally often.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _GlobalSum.apply(x)


def class_weights(scheme: WeightScheme, pixels_C: Any, images_C: Any, clip: tuple[float, float], beta: float) -> Tensor:
    """Weight of each class from what is labelled so far; rare classes weigh more.

    With f_c the share of labelled pixels and n_c the labelled images that hold class c: ``none`` 1, ``inverse`` 1/f_c,
    ``sqrt_inverse`` 1/sqrt(f_c), ``median_frequency`` median(f)/f_c, ``enet`` 1/ln(1.02 + f_c) (Paszke et al. 2016),
    ``effective_number`` (1 - beta)/(1 - beta^n_c) (Cui et al., CVPR 2019; on image counts, as pixel counts saturate).
    Weights of the classes present are scaled to mean 1, then clipped.

    Args:
        scheme: One of the above.
        pixels_C: Labelled pixels of each class [C].
        images_C: Labelled images that hold each class [C].
        clip: Lowest and highest weight.
        beta: Of ``effective_number``, in (0, 1).

    Returns:
        float32 [C]; 1 for classes that are not labelled anywhere.
    """
    pixels, images = torch.as_tensor(pixels_C).double(), torch.as_tensor(images_C).double()
    weights_C = torch.ones(len(pixels), dtype=torch.float64)
    present_C = images > 0 if scheme == "effective_number" else pixels > 0
    if scheme == "none" or not present_C.any():
        return weights_C.float()
    share = (pixels / pixels.sum().clamp_min(1))[present_C]
    if scheme == "inverse":
        raw = 1 / share
    elif scheme == "sqrt_inverse":
        raw = share.rsqrt()
    elif scheme == "median_frequency":
        raw = share.quantile(0.5) / share
    elif scheme == "enet":
        raw = 1 / torch.log(1.02 + share)
    else:
        raw = (1 - beta) / -torch.expm1(images[present_C] * math.log(beta))
    weights_C[present_C] = (raw / raw.mean()).clamp(*clip)
    return weights_C.float()


def wce(logits_BCHW: Tensor, target_BHW: Tensor, weights_C: Tensor | None = None) -> Tensor:
    """Weighted cross entropy: sum_x w_y(x) (-log p_y(x)) / sum_x w_y(x) over labelled pixels of all workers."""
    weight_BHW = _pixel_weights(target_BHW, weights_C, logits_BCHW)
    return _global_ratio(weight_BHW * _nll(logits_BCHW, target_BHW), weight_BHW)


def focal(logits_BCHW: Tensor, target_BHW: Tensor, weights_C: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017) of the softmax: sum_x w_y (1 - p_y)^gamma (-log p_y) / sum_x w_y."""
    nll_BHW = _nll(logits_BCHW, target_BHW)
    weight_BHW = _pixel_weights(target_BHW, weights_C, logits_BCHW)
    # 1 - p without cancellation; above 0, as the slope of a power under 1 is infinite there.
    wrong_BHW = (-torch.expm1(-nll_BHW)).clamp_min(1e-12)
    return _global_ratio(weight_BHW * wrong_BHW**gamma * nll_BHW, weight_BHW)


def dice(logits_BCHW: Tensor, target_BHW: Tensor) -> Tensor:
    """Soft Dice over the whole batch: mean over classes present of 1 - (2 I_c + 1) / (P_c + Y_c + 1).

    I_c = sum p_c y_c, P_c = sum p_c, Y_c = sum y_c over labelled pixels of all workers; classes without a labelled pixel in
    the batch do not count.
    """
    p_BCHW = logits_BCHW.float().softmax(dim=1)
    classes_C = torch.arange(p_BCHW.shape[1], device=p_BCHW.device)
    y_BCHW = target_BHW[:, None] == classes_C.view(1, -1, 1, 1)
    p_BCHW = p_BCHW * (target_BHW != IGNORE)[:, None]
    over = (0, 2, 3)
    both_C, predicted_C, true_C = global_sum(torch.stack([(p_BCHW * y_BCHW).sum(over), p_BCHW.sum(over), y_BCHW.sum(over).float()]))
    present_C = true_C > 0
    loss_C = 1 - (2 * both_C + 1) / (predicted_C + true_C + 1)
    return (loss_C * present_C).sum() / present_C.sum().clamp_min(1)


def ohem(logits_BCHW: Tensor, target_BHW: Tensor, threshold: float = 0.7, min_kept: int = 100_000) -> Tensor:
    """Cross entropy over hard pixels: those with p_y <= max(threshold, the min_kept-th smallest p_y). Per worker.

    At least min_kept pixels are kept, all where fewer are labelled; plain mean over them (Shrivastava et al., CVPR 2016).
    """
    nll_BHW = _nll(logits_BCHW, target_BHW)
    kept_BHW = target_BHW != IGNORE
    hardness_N = nll_BHW.detach()[kept_BHW]
    if hardness_N.numel() > min_kept:
        # Compared as -log p, which tells apart the hardest pixels, whose p all round to 0.
        easiest_kept = hardness_N.kthvalue(hardness_N.numel() - min_kept + 1).values
        kept_BHW = kept_BHW & (nll_BHW.detach() >= easiest_kept.clamp_max(-math.log(threshold) if threshold > 0 else math.inf))
    return (nll_BHW * kept_BHW).sum() / kept_BHW.sum().clamp_min(1)


def lovasz(logits_BCHW: Tensor, target_BHW: Tensor) -> Tensor:
    """Lovasz-softmax over classes present (Berman et al., CVPR 2018), the piecewise linear extension of 1 - IoU. Per worker."""
    p_BCHW = logits_BCHW.float().softmax(dim=1)
    labelled_BHW = target_BHW != IGNORE
    p_NC, target_N = p_BCHW.movedim(1, -1)[labelled_BHW], target_BHW[labelled_BHW]
    losses = []
    for c in target_N.unique().tolist():
        true_N = (target_N == c).float()
        error_N, hardest_first_N = (true_N - p_NC[:, c]).abs().sort(descending=True)
        losses.append((error_N * _jaccard_steps(true_N[hardest_first_N])).sum())
    return torch.stack(losses).mean() if losses else 0 * p_BCHW.sum()


def supervised(
    logits_BCHW: Tensor, target_BHW: Tensor, cfg: LossConfig, weights_C: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The supervised loss of one branch: the configured terms, weighted and added.

    Args:
        logits_BCHW: [B, C, H, W], any float type.
        target_BHW: [B, H, W] class ids of any integer type; 255 = ignored.
        cfg: Terms and their settings.
        weights_C: Class weights of wce and focal; None weighs all alike.

    Returns:
        The loss (float32 scalar), and each term's own value, detached, for logs.
    """
    terms = {name: TERMS[name](logits_BCHW, target_BHW, cfg, weights_C) for name in cfg.terms}
    total = torch.stack([weight * terms[name] for name, weight in cfg.terms.items()]).sum()
    return total, {name: value.detach() for name, value in terms.items()}


def cross_pseudo(logits_BCHW: Tensor, pseudo_BHW: Tensor, where_BHW: Tensor, weights_C: Tensor | None = None) -> Tensor:
    """Cross entropy against the other branch's labels: (weighted) mean over pixels that `where` marks, on all workers (CPS, eq. 3).

    Args:
        logits_BCHW: The learning branch.
        pseudo_BHW: argmax of the other branch, no gradient; class ids of any integer type.
        where_BHW: bool; pixels that count. Elsewhere pseudo labels may be anything.
        weights_C: Class weights; None weighs all alike, as CPS does.
    """
    return wce(logits_BCHW, torch.where(where_BHW, pseudo_BHW.long(), IGNORE), weights_C)


@torch.no_grad()
def pseudo_labels(logits_BCHW: Tensor, threshold: float = 0.0, by_class: bool = False, valid_BHW: Tensor | None = None) -> Tensor:
    """Hard labels of a branch for the other one: argmax, IGNORE where it is not sure enough.

    With p the confidence of a pixel and mu_c the mean confidence of the valid pixels that the batch, over all workers, gives to class c, a
    pixel counts where p >= threshold, or by class where p >= threshold * mu_c / max mu: a class that the branch is not sure of yet is let
    in earlier (the idea of FlexMatch, Zhang et al., NeurIPS 2021, and of AEL's confidence bank, Hu et al., NeurIPS 2021; of this batch
    alone, so that a resumed training goes on with nothing to remember).

    Args:
        logits_BCHW: [B, C, H, W].
        threshold: 0 keeps every pixel.
        by_class: Whether to scale it.
        valid_BHW: bool; the pixels that make the class means. None: all.

    Returns:
        int64 [B, H, W].
    """
    if threshold == 0:
        return logits_BCHW.argmax(1)
    confidence_BHW, label_BHW = logits_BCHW.float().softmax(1).max(1)
    needed = torch.full((logits_BCHW.shape[1],), threshold, device=logits_BCHW.device)
    if by_class:
        counted = torch.ones_like(label_BHW, dtype=torch.bool) if valid_BHW is None else valid_BHW
        named, sure = label_BHW[counted], confidence_BHW[counted]
        sums_C = torch.zeros_like(needed).index_add_(0, named, sure)
        counts_C = torch.zeros_like(needed).index_add_(0, named, torch.ones_like(sure))
        sums_C, counts_C = global_sum(torch.stack([sums_C, counts_C]))
        mu_C = sums_C / counts_C.clamp_min(1)
        needed = threshold * mu_C / mu_C.max().clamp_min(1e-6)
    return torch.where(confidence_BHW >= needed[label_BHW], label_BHW, IGNORE)


def ramp(step: int, steps: int, fraction: float) -> float:
    """Share of lambda at a step: exp(-5 (1 - t/T)^2) over the first T = fraction * steps (Laine & Aila, ICLR 2017), then 1."""
    length = fraction * steps
    return 1.0 if step >= length else math.exp(-5 * (1 - step / length) ** 2)


TERMS: dict[LossName, Callable[[Tensor, Tensor, LossConfig, Tensor | None], Tensor]] = {
    "wce": lambda z, y, cfg, w: wce(z, y, w),
    "dice": lambda z, y, cfg, w: dice(z, y),
    "focal": lambda z, y, cfg, w: focal(z, y, w, cfg.focal_gamma),
    "ohem": lambda z, y, cfg, w: ohem(z, y, cfg.ohem_threshold, cfg.ohem_min_kept),
    "lovasz": lambda z, y, cfg, w: lovasz(z, y),
}


def _nll(logits_BCHW: Tensor, target_BHW: Tensor) -> Tensor:
    """-log p_y in float32 [B, H, W]; 0 without gradient at ignored pixels."""
    return F.cross_entropy(logits_BCHW.float(), target_BHW.long(), ignore_index=IGNORE, reduction="none")


def _pixel_weights(target_BHW: Tensor, weights_C: Tensor | None, logits_BCHW: Tensor) -> Tensor:
    """Each pixel's class weight, float32 [B, H, W]; 0 at ignored pixels."""
    labelled_BHW = target_BHW != IGNORE
    if weights_C is None:
        return labelled_BHW.float()
    weights_C = weights_C.to(logits_BCHW.device, torch.float32)
    return weights_C[torch.where(labelled_BHW, target_BHW.long(), 0)] * labelled_BHW


def _global_ratio(top_BHW: Tensor, bottom_BHW: Tensor) -> Tensor:
    """Sum of one over sum of the other, over all workers; 0 where both are."""
    top, bottom = global_sum(torch.stack([top_BHW.sum(), bottom_BHW.sum()]))
    return top / torch.where(bottom > 0, bottom, 1.0)


def _jaccard_steps(true_N: Tensor) -> Tensor:
    """How much 1 - IoU grows with each further pixel got wrong, hardest first (Alg. 1 of Berman et al.)."""
    missed_N, added_N = true_N.cumsum(0), (1 - true_N).cumsum(0)
    jaccard_N = 1 - (true_N.sum() - missed_N) / (true_N.sum() + added_N)
    return torch.diff(jaccard_N, prepend=jaccard_N.new_zeros(1))
