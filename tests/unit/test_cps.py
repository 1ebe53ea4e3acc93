"""Cross pseudo supervision, step by step: each promise of the training step against a reference written out by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from raysal.config import Config
from raysal.datasets.augment import cutmix_boxes, draw_seed
from raysal.datasets.base import Dataset, Item
from raysal.errors import CheckpointError
from raysal.labels import AI4MARS, IGNORE, S5MARS, LabelSet
from raysal.model import checkpoint, losses
from raysal.model.checkpoint import ModelInfo
from raysal.model.network import TwoBranch
from raysal.train import loop
from raysal.train.feeds import LabeledBatch, UnlabeledBatch
from raysal.train.loop import Learner
from raysal.train.plan import Plan
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CLASSES, SIZE = AI4MARS.n_classes, 12
SMALL = {"arch": "Unet", "encoder": "tu-mobilenetv3_small_050", "dropout": 0.0}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "grad_clip": 0.0}
CROSS_ENTROPY = {"terms": {"wce": 1.0}, "class_weights": "none"}


class StubBranch(nn.Module):
    """Its labels depend on a pixel's neighbours, so that it matters whether images are mixed or labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 8 * self.head(torch.tanh(4 * self.encoder(x))).float()


class Stub(nn.Module):
    """Two branches without batch norm or dropout: an image's logits do not depend on its batch."""

    def __init__(self, cfg: object, n_classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.branches = nn.ModuleList([StubBranch(), StubBranch()])
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += 1
        z1, z2 = (branch(images.float() / 127.5 - 1) for branch in self.branches)
        return z1, z2


@dataclass
class Alone:
    """A session of one rank that nobody else takes part in."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    def wrap(self, model: nn.Module) -> nn.Module:
        return model


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners of this test train the stub."""
    monkeypatch.setattr(loop, "TwoBranch", Stub)
    monkeypatch.setattr(loop, "prepare", lambda model, cfg, device: model)


def plan_of(start: str | None = None, label_set: LabelSet = AI4MARS, **sections: dict) -> Plan:
    cfg: Config = tiny("unused", **{"loss": CROSS_ENTROPY, "optim": SGD} | sections)
    dataset, item = Dataset("none", label_set, {}), (Item("a", "a.png"),)
    ones = (1,) * label_set.n_classes
    return Plan(cfg, dataset, item, item, (), ones, ones, start)


def learner_of(session: Alone | None = None, **sections: dict) -> Learner:
    learner = Learner(plan_of(**sections), session or Alone())
    learner.bind()
    return learner


def labeled_batch(seed: int = 0, size: int = SIZE, n: int = 2) -> LabeledBatch:
    """Some pixels are not valid; of the valid ones some are blank."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(n, size, size, generator=g) < 0.8
    y = torch.randint(0, CLASSES, valid.shape, generator=g, dtype=torch.uint8)
    y[~valid | (torch.rand(valid.shape, generator=g) < 0.5)] = IGNORE
    return images(g, n, size), y, valid


def unlabeled_batch(n: int = 4, seed: int = 1, size: int = SIZE) -> UnlabeledBatch:
    g = torch.Generator().manual_seed(seed)
    return images(g, n, size), torch.rand(n, size, size, generator=g) < 0.7


def images(g: torch.Generator, n: int, size: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)


def changed(model: nn.Module) -> None:
    """Other weights, so that a model is told from the one it was copied from."""
    g = torch.Generator().manual_seed(77)
    for p in model.parameters():
        p.data += 0.5 * torch.randn(p.shape, generator=g)


def boxes_of(cfg: Config, pair: int) -> Tensor:
    return cutmix_boxes(1, SIZE, SIZE, cfg.cps.cutmix_boxes, cfg.cps.cutmix_area, draw_seed(cfg.seed, "cutmix", pair))[0]


def by_hand(cfg: Config, student: nn.Module, teacher: nn.Module, step: int, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> Tensor:
    """The cps term, one image after the other: CE(z_1, Y_2) + CE(z_2, Y_1), both over the pixels that count."""
    seen = []  # what the student sees, the labels of both branches, where they count
    for x, y, valid in zip(*labeled, strict=True):
        with torch.no_grad():
            pseudo = [z[0].argmax(0) for z in teacher(x[None])]
        blank = valid & (y == IGNORE)
        where = (valid & (y != IGNORE)) if not cfg.cps.cutmix else torch.zeros_like(valid)
        seen.append((x, pseudo, where | blank if cfg.cps.on_null else where))
    xs, valids = unlabeled
    with torch.no_grad():
        pseudos = [[z[0].argmax(0) for z in teacher(x[None])] for x in xs]
    if not cfg.cps.cutmix:
        seen += list(zip(xs, pseudos, valids, strict=True))
    else:
        pairs = len(xs) // 2
        for k in range(pairs):
            a, b, m = 2 * k, 2 * k + 1, boxes_of(cfg, step * pairs + k).int()
            x, valid = (1 - m) * xs[a] + m * xs[b], ((1 - m) * valids[a] + m * valids[b]).bool()
            seen.append((x, [(1 - m) * pseudos[a][j] + m * pseudos[b][j] for j in (0, 1)], valid))
    total, count = torch.zeros(()), 0
    for x, (y1, y2), where in seen:
        logp1, logp2 = (z[0].log_softmax(0) for z in student(x[None]))
        total = total - (logp1.gather(0, y2[None])[0] + logp2.gather(0, y1[None])[0])[where].sum()
        count += int(where.sum())
    return total / count


def supervised_by_hand(student: nn.Module, labeled: LabeledBatch) -> Tensor:
    x, y, _ = labeled
    return torch.stack([F.cross_entropy(z, y.long(), ignore_index=IGNORE) for z in student(x)]).sum()


@pytest.mark.parametrize("ema", [False, True], ids=["student", "ema"])
@pytest.mark.parametrize("on_null", [False, True], ids=["labels", "blanks"])
@pytest.mark.parametrize("cutmix", [False, True], ids=["plain", "cutmix"])
def test_each_branch_learns_the_others_labels_on_the_pixels_that_count(stubbed: None, cutmix: bool, on_null: bool, ema: bool) -> None:
    learner = learner_of(cps={"cutmix": cutmix, "on_null": on_null, "ema": ema, "weight": 1.5, "ramp_fraction": 0.5})
    cfg, step, labeled, unlabeled = learner.plan.cfg, 3, labeled_batch(), unlabeled_batch(4 if cutmix else 2)
    if ema:
        changed(learner.teacher)
    student = copy.deepcopy(learner.model)
    teacher = copy.deepcopy(learner.teacher) if ema else student
    cps, sup = by_hand(cfg, student, teacher, step, labeled, unlabeled), supervised_by_hand(student, labeled)
    loss = sup + 1.5 * losses.ramp(step, 12, 0.5) * cps
    loss.backward()

    out = learner.step(step, labeled, unlabeled)
    torch.testing.assert_close(out["cps"], cps.detach())
    torch.testing.assert_close(out["sup1"] + out["sup2"], sup.detach())
    torch.testing.assert_close(out["loss"], loss.detach())
    for own, expected in zip(learner.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-3, atol=1e-5)  # a pseudo label gives its maker no gradient


def test_labels_under_the_threshold_do_not_count(stubbed: None) -> None:
    learner = learner_of(cps={"threshold": 0.6, "cutmix": False, "on_null": False, "weight": 1.0})
    student, labeled, (x, valid) = copy.deepcopy(learner.model), labeled_batch(), unlabeled_batch(2)
    every, total, count = torch.cat([labeled[0], x]), torch.zeros(()), 0
    with torch.no_grad():
        probabilities = [z.softmax(1) for z in student(every)]
    where = torch.cat([labeled[2] & (labeled[1] != IGNORE), valid])
    logp = [z.log_softmax(1) for z in student(every)]
    for own, other in ((0, 1), (1, 0)):
        sure, y = probabilities[other].max(1)
        counts = where & (sure >= 0.6)
        total = total - logp[own].gather(1, y[:, None])[:, 0][counts].sum() / counts.sum()
        count += int(counts.sum())
    assert 0 < count < 2 * int(where.sum())
    torch.testing.assert_close(learner.step(0, labeled, (x, valid))["cps"], total.detach())


def test_pseudo_labels_weigh_by_class_where_asked(stubbed: None) -> None:
    learner = learner_of(cps={"weighted": True, "cutmix": False, "on_null": False})
    learner.weights_C = torch.arange(1.0, CLASSES + 1)
    student, labeled, (x, valid) = copy.deepcopy(learner.model), labeled_batch(), unlabeled_batch(2)
    where = torch.cat([labeled[2] & (labeled[1] != IGNORE), valid])
    z = student(torch.cat([labeled[0], x]))
    expected = torch.zeros(())
    for own, other in ((0, 1), (1, 0)):
        y = z[other].argmax(1)
        w = learner.weights_C[y] * where
        expected = expected + (w * F.cross_entropy(z[own], y, reduction="none")).sum() / w.sum()
    torch.testing.assert_close(learner.step(0, labeled, (x, valid))["cps"], expected.detach())


def test_class_thresholds_follow_how_sure_a_class_is() -> None:
    # Class 0 is named with 0.9 and 0.7 (mean 0.8), class 1 with 0.6 and 0.4 (mean 0.5): its threshold is 0.5/0.8 of the other's.
    p = torch.tensor([[[0.9, 0.7, 0.3, 0.3]], [[0.05, 0.2, 0.6, 0.4]], [[0.05, 0.1, 0.1, 0.3]]])[None]
    assert losses.pseudo_labels(p.log()).tolist() == [[[0, 0, 1, 1]]]
    assert losses.pseudo_labels(p.log(), 0.75).tolist() == [[[0, IGNORE, IGNORE, IGNORE]]]
    assert losses.pseudo_labels(p.log(), 0.75, by_class=True).tolist() == [[[0, IGNORE, 1, IGNORE]]]


def test_pasted_regions_bring_their_hand_labels_and_rare_classes_first(stubbed: None) -> None:
    learner = learner_of(cps={"paste": 1.0})
    learner.weights_C = torch.tensor([1e-6] * (CLASSES - 1) + [1.0])
    (x_l, y_l, _), (x_u, valid_u) = labeled_batch(), unlabeled_batch(3)
    pseudo = [torch.full((3, SIZE, SIZE), k) for k in (0, 1)]
    x, valid, labels = learner._paste(0, x_l, y_l.long(), x_u, valid_u, pseudo)
    for i in range(3):
        source = i * 2 // 3
        region = y_l[source] == CLASSES - 1
        assert region.any()
        assert torch.equal(x[i], torch.where(region, x_l[source], x_u[i])) and torch.equal(valid[i], valid_u[i] | region)
        for k in (0, 1):
            assert torch.equal(labels[k][i], torch.where(region, CLASSES - 1, k))


def test_pasting_is_a_draw_of_each_image_the_same_on_any_number_of_ranks(stubbed: None) -> None:
    (x_l, y_l, _), (x_u, valid_u) = labeled_batch(n=2), unlabeled_batch(4)
    pseudo = [torch.zeros(4, SIZE, SIZE, dtype=torch.long)] * 2
    whole = learner_of(cps={"paste": 0.5}, train={"batch_unlabeled": 4})._paste(7, x_l, y_l.long(), x_u, valid_u, pseudo)[0]
    changed_ = [not torch.equal(a, b) for a, b in zip(whole, x_u, strict=True)]
    assert any(changed_) and not all(changed_)
    for rank in (0, 1):
        part, own = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
        learner = learner_of(Alone(rank, 2), cps={"paste": 0.5}, train={"batch_unlabeled": 4})
        mine = learner._paste(7, x_l[own], y_l[own].long(), x_u[part], valid_u[part], [p[part] for p in pseudo])[0]
        assert torch.equal(mine, whole[part])


def test_without_unlabelled_images_only_labels_teach(stubbed: None) -> None:
    learner, labeled = learner_of(), labeled_batch()
    expected = supervised_by_hand(copy.deepcopy(learner.model), labeled)
    out = learner.step(0, labeled, None)
    torch.testing.assert_close(out["loss"], expected.detach())
    assert out["cps"] == 0 and "pseudo1" not in out
    assert learner.published is learner.model and learner.teacher is None


@pytest.mark.parametrize("cutmix", [False, True])
def test_reported_labels_are_each_branchs_own_on_valid_pixels_and_ignored_elsewhere(stubbed: None, cutmix: bool) -> None:
    learner = learner_of(cps={"cutmix": cutmix})
    (x, y, valid_l), (x_u, valid_u) = labeled_batch(), unlabeled_batch(4 if cutmix else 2)
    expected = [torch.cat(z).argmax(1) for z in zip(learner.model(x), learner.model(x_u), strict=True)]
    valid = torch.cat([valid_l, valid_u])
    if cutmix:
        m = torch.stack([boxes_of(learner.plan.cfg, pair) for pair in (10, 11)])
        expected = [torch.cat([t[:2], torch.where(m, t[3::2], t[2::2])]) for t in expected]
        valid = torch.cat([valid[:2], torch.where(m, valid[3::2], valid[2::2])])
    out = learner.step(5, (x, y, valid_l), (x_u, valid_u))
    for name, labels in zip(("pseudo1", "pseudo2"), expected, strict=True):
        assert torch.equal(out[name], torch.where(valid, labels, IGNORE))
        assert torch.equal(out[name] == IGNORE, ~valid) and (~valid).any()


def test_agreement_is_the_share_of_a_class_of_branch_1_over_valid_pixels(stubbed: None) -> None:
    learner = learner_of(cps={"cutmix": False})
    (x, y, valid_l), (x_u, valid_u) = labeled_batch(), unlabeled_batch(2)
    first, second = (torch.cat(z).argmax(1) for z in zip(learner.model(x), learner.model(x_u), strict=True))
    valid = torch.cat([valid_l, valid_u])
    meter = loop._Meter(learner.plan)
    meter.waited(0)
    record = meter.read(learner.step(0, (x, y, valid_l), (x_u, valid_u)), learner.optimizer)
    named = {name: valid & (first == c) for c, name in enumerate(AI4MARS.classes)}
    expected = {name: (second == first)[where].float().mean().item() for name, where in named.items() if where.any()}
    assert record["agreement"] == pytest.approx(expected, abs=1e-4)
    assert 0 < min(expected.values()) < max(expected.values()) < 1

    a, b = torch.tensor([0, 0, 0, 2, IGNORE, IGNORE]), torch.tensor([0, 0, 1, 0, IGNORE, IGNORE])
    assert meter._agreement(a, b) == {AI4MARS.classes[0]: 0.6667, AI4MARS.classes[2]: 0.0}


@pytest.mark.parametrize(("ema_decay", "decays"), [(0.6, (0, 1 / 2, 0.6, 0.6, 0.6)), (0.996, (0, 1 / 2, 2 / 3, 3 / 4, 4 / 5))])
def test_the_average_is_a_plain_mean_until_its_decay_is_the_longer_memory(stubbed: None, ema_decay: float, decays: tuple) -> None:
    learner = learner_of(cps={"ema": True, "ema_decay": ema_decay})
    assert learner.published is learner.teacher and not learner.teacher.training
    changed(learner.teacher)  # whatever it starts from is forgotten at once
    expected: list[Tensor] = []
    for step, decay in enumerate(decays):
        learner.step(step, labeled_batch(step), unlabeled_batch(4, step))
        new = [p.detach().clone() for p in learner.model.parameters()]
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected or new, new, strict=True)]
        torch.testing.assert_close([p.data for p in learner.teacher.parameters()], expected)
    assert learner.teacher.passes == learner.model.passes == 5  # what is counted is taken over, not averaged


@pytest.mark.parametrize("drawn", [True, False])
def test_pseudo_labels_come_with_dropout_or_without_as_asked(drawn: bool) -> None:
    learner = learner_of(model=SMALL | {"dropout": 0.5}, cps={"pseudo_dropout": drawn})
    x, valid = unlabeled_batch(size=32)
    first, second = (learner._pseudo(x, valid) for _ in range(2))
    assert torch.equal(torch.stack(first), torch.stack(second)) != drawn
    assert all(m.training for m in learner.model.modules())  # the student's own pass drops all the same


@pytest.mark.parametrize("ema", [False, True])
def test_a_bfloat16_step_moves_every_parameter_and_stays_close_to_float32(ema: bool) -> None:
    def one(precision: str) -> tuple[dict[str, Tensor], Learner, list[str]]:
        learner = learner_of(model=SMALL, train={"precision": precision}, cps={"ema": ema})
        before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        out = learner.step(0, labeled_batch(size=32), unlabeled_batch(size=32))
        stuck = [name for name, p in learner.model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
        return out, learner, stuck

    (exact, _, _), (half, learner, stuck) = one("float32"), one("bfloat16")
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    assert len(trained) > 100
    assert not stuck
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    for name in ("sup1", "sup2", "cps", "loss"):
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], exact[name], rtol=0.05, atol=0)
    assert half["loss"] != exact["loss"]  # it did run in bfloat16


@pytest.mark.parametrize("world", [2, 4])
def test_a_mixed_image_is_the_same_on_any_number_of_ranks(stubbed: None, world: int) -> None:
    draws, step, shape = 8, 7, torch.Size((SIZE, SIZE))
    x, valid = unlabeled_batch(draws)
    alone = learner_of(train={"batch_unlabeled": draws // 2})
    ranks = [learner_of(Alone(rank, world), train={"batch_unlabeled": draws // 2}) for rank in range(world)]
    boxes = torch.cat([r._boxes(step, draws // 2 // world, shape) for r in ranks])
    whole = alone._boxes(step, draws // 2, shape)
    assert torch.equal(boxes, whole)
    assert torch.equal(whole, torch.stack([boxes_of(alone.plan.cfg, step * 4 + pair) for pair in range(4)]))
    assert len({b.numpy().tobytes() for s in range(6) for b in alone._boxes(s, draws // 2, shape)}) == 24  # no pair's boxes come again

    parts = [r._unlabeled(step, mine) for r, *mine in zip(ranks, x.chunk(world), valid.chunk(world), strict=True)]
    mixed, mixed_valid, pseudo = alone._unlabeled(step, (x, valid))
    assert torch.equal(torch.cat([p[0] for p in parts]), mixed)
    assert torch.equal(torch.cat([p[1] for p in parts]), mixed_valid)
    for k in (0, 1):
        assert torch.equal(torch.cat([p[2][k] for p in parts]), pseudo[k])


def test_the_learning_rate_falls_by_its_power_and_the_head_keeps_its_multiple(stubbed: None) -> None:
    steps = 5
    learner = learner_of(optim=SGD | {"lr": 0.2, "head_lr_multiple": 3.0, "poly_power": 0.9}, train={"steps": steps})
    groups = dict(zip(("encoder", "head"), learner.optimizer.param_groups, strict=True))
    for step in range(steps):
        before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        learner.step(step, labeled_batch(step), unlabeled_batch(4, step))
        rate = {"encoder": 0.2 * (1 - step / steps) ** 0.9, "head": 0.6 * (1 - step / steps) ** 0.9}
        assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(rate)
        for name, p in learner.model.named_parameters():
            torch.testing.assert_close(p.data, before[name] - rate[name.split(".")[2]] * p.grad)


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_the_gradient_norm_is_clipped_over_both_branches(stubbed: None, clip: float) -> None:
    learner = learner_of(optim=SGD | {"grad_clip": clip})
    learner.step(0, labeled_batch(), unlabeled_batch())
    norm = torch.stack([p.grad.norm() for p in learner.model.parameters()]).norm().item()
    assert norm == pytest.approx(0.05, rel=1e-3) if clip else norm > 0.1


def test_a_warm_start_takes_the_weights_of_a_checkpoint_and_refuses_other_classes(tmp_path: Path) -> None:
    cfg = tiny("unused", model=SMALL).model
    source = TwoBranch(cfg, CLASSES, seed=9)
    source.train()(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))  # batch statistics that are not the initial ones
    checkpoint.save(str(tmp_path), source, ModelInfo(AI4MARS, cfg, input_scale=1.0, tile_px=32))

    def same(model: nn.Module) -> bool:
        return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True))

    learner = learner_of(start=str(tmp_path), model=SMALL, cps={"ema": True})
    assert same(learner.model) and same(learner.teacher)
    assert learner.model.training and all(p.requires_grad for p in learner.model.parameters())
    assert not same(learner_of(model=SMALL).model)
    with pytest.raises(CheckpointError, match=r"made for 4 classes \(soil.*'s5mars' has 9"):
        learner_of(start=str(tmp_path), label_set=S5MARS, model=SMALL)


def test_a_frozen_encoder_keeps_its_weights_and_norms_while_the_head_learns(tmp_path: Path) -> None:
    weights = tmp_path / "encoder.safetensors"
    encoder = TwoBranch(tiny("unused", model=SMALL).model, CLASSES, seed=9).branches[0].get_submodule("encoder")
    save_file(encoder.state_dict(), weights)
    learner = learner_of(model=SMALL | {"encoder_weights": str(weights)}, optim={"freeze_encoder": True}, cps={"ema": True})
    learner.model.train()
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    for step in range(2):
        learner.step(step, labeled_batch(), unlabeled_batch())
    moved = {k for k, v in learner.model.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in moved if ".encoder." in k]
    assert [k for k in moved if "decoder" in k and k.endswith("running_mean")] and [k for k in moved if "head" in k]
