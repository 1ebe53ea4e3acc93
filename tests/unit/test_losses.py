"""Losses equal their formulas and the libraries', survive what batches bring, and have one gradient on any number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysal.config import LossConfig
from raysal.labels import IGNORE
from raysal.model import losses

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = LossConfig(terms={"wce": 1.0, "dice": 0.5, "focal": 2.0, "ohem": 0.25, "lovasz": 0.75}, ohem_threshold=0.3, ohem_min_kept=7)
TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wce": lambda z, y: losses.wce(z, y, torch.linspace(0.2, 3, z.shape[1])),
    "focal": lambda z, y: losses.focal(z, y, torch.linspace(0.2, 3, z.shape[1]), 2.0),
    "focal, gamma 0.5": lambda z, y: losses.focal(z, y, None, 0.5),
    "focal, gamma 0": lambda z, y: losses.focal(z, y, None, 0.0),
    "dice": losses.dice,
    "ohem": lambda z, y: losses.ohem(z, y, 0.3, 7),
    "lovasz": losses.lovasz,
    "supervised": lambda z, y: losses.supervised(z, y, EVERY, torch.linspace(0.2, 3, z.shape[1]))[0],
    "cross_pseudo": lambda z, y: losses.cross_pseudo(z, y, y != IGNORE),
}
each_term = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())


def batch(seed: int, scale: float = 3.0, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits and a target with ignored pixels, in which some classes don't occur."""
    g = torch.Generator().manual_seed(seed)
    n_classes = classes or int(torch.randint(2, 8, (1,), generator=g))
    shape = [int(n) for n in torch.randint(1, 7, (3,), generator=g)]
    z = scale * torch.randn(shape[0], n_classes, *shape[1:], generator=g)
    present = torch.randperm(n_classes, generator=g)[: int(torch.randint(1, n_classes + 1, (1,), generator=g))]
    y = present[torch.randint(0, len(present), shape, generator=g)]
    y[torch.rand(shape, generator=g) < 0.4] = IGNORE
    y.view(-1)[0] = present[0]  # at least one label
    return z, y


def pixels(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 probabilities [N, C] and class ids [N] of the labelled pixels."""
    return z.double().softmax(1).movedim(1, -1)[y != IGNORE], y[y != IGNORE]


seeds = given(st.integers(0, 2**32 - 1))
quick = settings(max_examples=40, deadline=None)


@quick
@seeds
def test_wce_is_its_formula_and_torchs_weighted_mean(seed: int) -> None:
    z, y = batch(seed)
    w = torch.rand(z.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.1
    p, t = pixels(z, y)
    formula = (w[t] * -p.gather(1, t[:, None])[:, 0].log()).sum() / w[t].sum()
    torch.testing.assert_close(losses.wce(z, y, w).double(), formula, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.wce(z, y, w), F.cross_entropy(z, y, w, ignore_index=IGNORE))
    torch.testing.assert_close(losses.wce(z, y), F.cross_entropy(z, y, ignore_index=IGNORE))


@quick
@seeds
def test_focal_is_its_formula_and_smps_softmax_focal(seed: int) -> None:
    z, y = batch(seed)
    w = torch.rand(z.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.1
    p, t = pixels(z, y)
    p_y = p.gather(1, t[:, None])[:, 0]
    formula = (w[t] * (1 - p_y) ** 2 * -p_y.log()).sum() / w[t].sum()
    torch.testing.assert_close(losses.focal(z, y, w, 2.0).double(), formula, rtol=1e-5, atol=1e-6)
    # smp's knows no weights and no ignored pixels: equal weights, on the labelled pixels alone.
    library = softmax_focal_loss_with_logits(z.movedim(1, -1)[y != IGNORE], t, gamma=2.0)
    torch.testing.assert_close(losses.focal(z, y, None, 2.0), library, rtol=1e-4, atol=1e-6)


@quick
@seeds
def test_focal_of_two_classes_is_smps_binary_focal_loss(seed: int) -> None:
    """smp.losses.FocalLoss is one sigmoid a class; the two definitions meet at two classes, with logit z_1 - z_0."""
    z, y = batch(seed, classes=2)
    library = smp.losses.FocalLoss("binary", alpha=None, gamma=2.0, ignore_index=IGNORE)
    torch.testing.assert_close(losses.focal(z, y, None, 2.0), library(z[:, 1] - z[:, 0], y), rtol=1e-4, atol=1e-6)


@quick
@seeds
def test_focal_with_gamma_0_is_wce(seed: int) -> None:
    z, y = batch(seed)
    w = torch.linspace(0.2, 4, z.shape[1])
    torch.testing.assert_close(losses.focal(z, y, w, 0.0), losses.wce(z, y, w))


@quick
@seeds
def test_dice_is_its_formula_over_present_classes_and_smps(seed: int) -> None:
    z, y = batch(seed)
    p, t = pixels(z, y)
    per_class = []
    for c in t.unique().tolist():
        both, predicted, true = p[t == c, c].sum(), p[:, c].sum(), (t == c).sum()
        per_class.append(1 - (2 * both + 1) / (predicted + true + 1))
    torch.testing.assert_close(losses.dice(z, y).double(), torch.stack(per_class).mean(), rtol=1e-5, atol=1e-6)
    # smp adds its smoothing to I and to (P + Y) / 2, so 0.5 there is 1 here; its mean counts absent classes as 0.
    library = smp.losses.DiceLoss("multiclass", smooth=0.5, ignore_index=IGNORE)(z, y) * z.shape[1] / len(per_class)
    torch.testing.assert_close(losses.dice(z, y), library, rtol=1e-4, atol=1e-6)


@quick
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0, 1))
def test_ohem_is_its_formula(seed: int, min_kept: int, threshold: float) -> None:
    z, y = batch(seed)
    p, t = pixels(z, y)
    p_y = p.gather(1, t[:, None])[:, 0]
    bar = max(threshold, p_y.sort().values[min(min_kept, len(p_y)) - 1].item())
    # A pixel within rounding of the bar may fall on either side in float32.
    if ((p_y - bar).abs().sort().values[1:2] < 1e-6).any() or ((p_y - threshold).abs() < 1e-6).any():
        return
    formula = -p_y[p_y <= bar].log().mean()
    torch.testing.assert_close(losses.ohem(z, y, threshold, min_kept).double(), formula, rtol=1e-5, atol=1e-6)


@quick
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_ohem_keeps_at_least_min_kept(seed: int, min_kept: int) -> None:
    z, y = batch(seed)
    z.requires_grad_()
    losses.ohem(z, y, 0.0, min_kept).backward()
    kept = int((z.grad.abs().sum(1) > 0).sum())
    assert kept >= min(min_kept, int((y != IGNORE).sum()))


@quick
@seeds
def test_ohem_is_plain_cross_entropy_where_all_pixels_are_kept(seed: int) -> None:
    z, y = batch(seed)
    plain = F.cross_entropy(z, y, ignore_index=IGNORE)
    torch.testing.assert_close(losses.ohem(z, y, 0.0, y.numel()), plain)
    torch.testing.assert_close(losses.ohem(z, y, 1.0, 1), plain)


@quick
@seeds
def test_lovasz_is_its_formula_and_smps(seed: int) -> None:
    z, y = batch(seed)
    p, t = pixels(z, y)
    per_class = []
    for c in t.unique().tolist():
        errors = torch.where(t == c, 1 - p[:, c], p[:, c])
        total, wrong, before, true = 0.0, set(), 0.0, {i for i, v in enumerate(t.tolist()) if v == c}
        for i in errors.argsort(descending=True).tolist():
            wrong.add(i)
            jaccard_loss = len(wrong) / len(true | wrong)
            total += errors[i].item() * (jaccard_loss - before)
            before = jaccard_loss
        per_class.append(total)
    assert losses.lovasz(z, y).item() == pytest.approx(sum(per_class) / len(per_class), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(losses.lovasz(z, y), smp.losses.LovaszLoss("multiclass", ignore_index=IGNORE)(z, y), rtol=1e-4, atol=1e-5)


def test_supervised_is_the_weighted_sum_of_its_terms() -> None:
    z, y = batch(3)
    w = torch.linspace(0.2, 3, z.shape[1])
    z.requires_grad_()
    total, parts = losses.supervised(z, y, EVERY, w)
    alone = {
        "wce": losses.wce(z, y, w),
        "dice": losses.dice(z, y),
        "focal": losses.focal(z, y, w, 2.0),
        "ohem": losses.ohem(z, y, 0.3, 7),
        "lovasz": losses.lovasz(z, y),
    }
    torch.testing.assert_close(total, sum(EVERY.terms[name] * value for name, value in alone.items()))
    for name, value in alone.items():
        torch.testing.assert_close(parts[name], value.detach())
        assert not parts[name].requires_grad


@each_term
def test_ignored_pixels_get_no_gradient_and_labelled_ones_do(term: Callable) -> None:
    z, y = batch(1, classes=5)
    z.requires_grad_()
    term(z, y).backward()
    per_pixel = z.grad.abs().sum(1)
    assert (per_pixel[y == IGNORE] == 0).all()
    assert (per_pixel[y != IGNORE] > 0).any()


@each_term
def test_ignored_pixels_do_not_change_a_loss(term: Callable) -> None:
    z, y = batch(2, classes=4)
    other = torch.where((y == IGNORE)[:, None], 50 * torch.randn_like(z), z)
    torch.testing.assert_close(term(other, y), term(z, y))


@each_term
def test_a_batch_without_labels_gives_0_with_zero_gradients(term: Callable) -> None:
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = term(z, torch.full((2, 3, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@each_term
@pytest.mark.parametrize("scale", [80.0, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(term: Callable, scale: float) -> None:
    y = torch.randint(0, 4, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    z = torch.full((2, 4, 6, 6), -scale)
    z[0].scatter_(0, y[:1], scale)  # one image all right, one all wrong
    z[1].scatter_(0, (y[1:] + 1) % 4, scale)
    z.requires_grad_()
    loss = term(z, y)
    loss.backward()
    assert math.isfinite(loss.item()) and loss.item() > 0
    assert z.grad.isfinite().all()


@each_term
def test_losses_are_computed_in_float32_under_bfloat16_autocast(term: Callable) -> None:
    z, y = batch(4)
    half = z.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(half, y)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, term(half.float(), y))


@each_term
def test_targets_may_be_bytes(term: Callable) -> None:
    z, y = batch(5)
    assert torch.equal(term(z, y.to(torch.uint8)), term(z, y))


def test_cross_pseudo_is_the_mean_cross_entropy_where_marked() -> None:
    z, _ = batch(6, classes=4)
    pseudo = torch.randint(0, 4, z[:, 0].shape)
    where = torch.rand(pseudo.shape) < 0.5
    where.view(-1)[0] = True
    torch.testing.assert_close(losses.cross_pseudo(z, pseudo, where), F.cross_entropy(z.movedim(1, -1)[where], pseudo[where]))


def test_ramp_rises_from_almost_0_to_1_over_its_share_of_the_steps() -> None:
    assert losses.ramp(0, 1000, 0.1) == pytest.approx(math.exp(-5))
    assert losses.ramp(50, 1000, 0.1) == pytest.approx(math.exp(-1.25))
    assert losses.ramp(100, 1000, 0.1) == losses.ramp(999, 1000, 0.1) == 1
    assert losses.ramp(0, 1000, 0.0) == 1
    values = [losses.ramp(step, 300, 0.5) for step in range(300)]
    assert values == sorted(values)


# Share of pixels (percent) and, of 5000 training images, those that hold the class: sky ridge soil sand bedrock rock rover trace hole.
SHARES = torch.tensor([10.27, 15.21, 12.89, 5.60, 51.65, 3.00, 0.36, 0.83, 0.19])
HOLDING = torch.tensor([925, 1315, 2941, 804, 4707, 2769, 134, 93, 45])
S5MARS_WEIGHTS = {
    "inverse": [0.09, 0.06, 0.07, 0.16, 0.02, 0.30, 2.50, 1.08, 4.73],
    "sqrt_inverse": [0.40, 0.33, 0.36, 0.54, 0.18, 0.74, 2.13, 1.40, 2.93],
    "enet": [0.42, 0.31, 0.35, 0.67, 0.11, 1.01, 2.10, 1.76, 2.26],
    "effective_number": [0.25, 0.18, 0.11, 0.28, 0.08, 0.11, 1.49, 2.13, 4.37],
}
UNCLIPPED = (1e-9, 1e9)


@pytest.mark.parametrize("scheme", S5MARS_WEIGHTS)
def test_class_weights_of_s5mars_are_the_published_shares(scheme: str) -> None:
    weights = losses.class_weights(scheme, 1e4 * SHARES, HOLDING * 169 / 5000, UNCLIPPED, 0.99)
    torch.testing.assert_close(weights, torch.tensor(S5MARS_WEIGHTS[scheme]), rtol=0, atol=0.011)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)


def test_median_frequency_weighs_by_the_median_share_over_the_class_s() -> None:
    weights = losses.class_weights("median_frequency", 1e4 * SHARES, HOLDING, UNCLIPPED, 0.99)
    ratio = weights / weights[3]  # sand holds the median share
    torch.testing.assert_close(ratio, torch.tensor([0.55, 0.37, 0.43, 1.00, 0.11, 1.87, 15.6, 6.7, 29.5]), rtol=0.01, atol=0.005)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scheme", [*S5MARS_WEIGHTS, "median_frequency"])
def test_absent_classes_weigh_1_and_do_not_move_the_others(scheme: str) -> None:
    pixels_C, images_C = 1e4 * SHARES, HOLDING.double()
    without = losses.class_weights(scheme, pixels_C[:6], images_C[:6], UNCLIPPED, 0.99)
    weights = losses.class_weights(scheme, [*pixels_C[:6].tolist(), 0, 0], [*images_C[:6].tolist(), 0, 0], UNCLIPPED, 0.99)
    torch.testing.assert_close(weights, torch.cat([without, torch.ones(2)]))
    assert torch.equal(losses.class_weights(scheme, [0, 0, 0], [0, 0, 0], (0.2, 10), 0.99), torch.ones(3))


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=12), st.sampled_from([*S5MARS_WEIGHTS, "median_frequency", "none"]))
def test_class_weights_stay_finite_and_inside_the_clip(counts: list[int], scheme: str) -> None:
    weights = losses.class_weights(scheme, counts, counts, (0.2, 10.0), 0.99)
    assert weights.dtype == torch.float32 and weights.shape == (len(counts),)
    assert ((weights >= 0.2) & (weights <= 10)).all()
    present = [(n, w) for n, w in zip(counts, weights.tolist(), strict=True) if n]
    assert all(w2 <= w1 + 1e-6 for n1, w1 in present for n2, w2 in present if n2 > n1)  # rarer never weighs less


GLOBAL = {
    "wce": lambda z, y: losses.wce(z, y, torch.tensor([0.3, 1.0, 4.0])),
    "focal": lambda z, y: losses.focal(z, y, torch.tensor([0.3, 1.0, 4.0]), 2.0),
    "dice": losses.dice,
    "cross_pseudo": lambda z, y: losses.cross_pseudo(z, z.detach().argmax(1).roll(1, 0), y == IGNORE),
}
CASES = ("uneven", "no label on the second worker", "no label at all")


def tiny_net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))


def global_batch(case: str) -> tuple[Tensor, Tensor]:
    """Four images of three classes; two workers take two each and hold very different numbers of labels."""
    g = torch.Generator().manual_seed(9)
    x, y = torch.randn(4, 3, 8, 8, generator=g), torch.randint(0, 3, (4, 8, 8), generator=g)
    y[2:][torch.rand(2, 8, 8, generator=g) < 0.9] = IGNORE
    y[:2][y[:2] == 2] = IGNORE  # class 2 is on the second worker only
    if case != "uneven":
        y[2 if case == CASES[1] else 0 :] = IGNORE
    return x, y


def gradients(net: nn.Module, x: Tensor, y: Tensor, loss: Callable) -> dict[str, Tensor]:
    net.zero_grad()
    value = loss(net(x), y)
    value.backward()
    grads = {name.removeprefix("module."): p.grad.clone() for name, p in net.named_parameters()}
    return grads | {"loss": value.detach()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = DistributedDataParallel(tiny_net())
    out = {}
    for case in CASES:
        x, y = (t[2 * rank : 2 * rank + 2] for t in global_batch(case))
        for name, loss in GLOBAL.items():
            out |= {f"{case}/{name}/{k}": v for k, v in gradients(net, x, y, loss).items()}
    out["sum"] = losses.global_sum(torch.tensor([1.0 + rank, 10.0]))
    save_file(out, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [load_file(Path(folder, f"{rank}.safetensors")) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GLOBAL)
def test_one_global_batch_has_one_gradient_on_1_and_on_2_workers(two_workers: list[dict[str, Tensor]], name: str, case: str) -> None:
    x, y = global_batch(case)
    if name == "cross_pseudo":  # its pseudo labels roll over images, which must not cross the workers' border here
        one = gradients(
            tiny_net(),
            x,
            y,
            lambda z, y: losses.cross_pseudo(z, torch.cat([h.detach().argmax(1).roll(1, 0) for h in z.chunk(2)]), y == IGNORE),
        )
    else:
        one = gradients(tiny_net(), x, y, GLOBAL[name])
    for rank in (0, 1):
        for key, expected in one.items():
            torch.testing.assert_close(two_workers[rank][f"{case}/{name}/{key}"], expected, rtol=1e-4, atol=1e-6)
    assert case == CASES[2] or one["loss"] > 0


def test_global_sum_adds_over_workers_and_is_the_identity_alone(two_workers: list[dict[str, Tensor]]) -> None:
    assert two_workers[0]["sum"].tolist() == two_workers[1]["sum"].tolist() == [3, 20]
    x = torch.ones(2)
    assert losses.global_sum(x) is x
