"""CPS-Mars: the training loop. It knows torch and the paper, and nothing of Ray (see ray.py for that).

    Y_k   = argmax_c z_k                            hard pseudo labels of branch k, no gradient (cps.threshold: only sure ones)
    L_cps = CE(z_1, Y_2) + CE(z_2, Y_1)             each branch learns from the other
    L     = L_sup(z_1, y) + L_sup(z_2, y) + lambda(t) * L_cps

Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021; S5Mars' sparse labels add the expert's
blank pixels to L_cps. docs/method.md has the whole of it.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from raysal.config import Config, Method, digest_of
from raysal.datasets.augment import cutmix_boxes, draw_seed
from raysal.errors import CheckpointError
from raysal.labels import IGNORE
from raysal.model import checkpoint, losses
from raysal.model.network import TwoBranch, prepare, without_dropout
from raysal.model.runtime import Predictor
from raysal.train.evaluate import Evaluation, evaluate
from raysal.train.feeds import Draws, LabeledBatch, UnlabeledBatch, loader, span
from raysal.train.plan import Plan
from raysal.train.state import Progress, load_state, save_state


class Session(Protocol):
    """What the loop needs of whoever runs it (Ray Train, one process, torchrun)."""

    rank: int
    world: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in the forward pass (DDP where world > 1)."""

    def resume(self) -> AbstractContextManager[Path | None]:
        """Local folder of the newest whole checkpoint, or None. A copy of one that lies elsewhere goes with the context."""

    def unlabeled(self, start_step: int) -> Iterator[UnlabeledBatch]:
        """This rank's share of each step's unlabelled images, from `start_step` on."""

    def report(self, metrics: dict, folder: Path | None) -> None:
        """Called by every rank; rank 0 hands over a checkpoint folder, which the session deletes when it is uploaded."""

    def log(self, record: dict, first_step: int | None = None) -> None:
        """One line of metrics from rank 0; `first_step` drops lines of steps at or after it, which will be done again."""


class Learner:
    """Two branches, their optimiser, and what one step does to them."""

    def __init__(self, plan: Plan, session: Session) -> None:
        cfg, self.plan, self.session = plan.cfg, plan, session
        n_classes = plan.dataset.label_set.n_classes
        self.model = prepare(TwoBranch(plan.model, n_classes, cfg.seed), cfg.model, session.device)
        if plan.start:
            self._warm_start(plan.start)
        if cfg.optim.freeze_encoder:
            self.model.freeze_encoders()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval() if cfg.cps.ema else None
        self.optimizer = _optimizer(self.model, cfg)
        self.weights_C = losses.class_weights(
            cfg.loss.class_weights,
            torch.tensor(plan.pixels),
            torch.tensor(plan.images),
            cfg.loss.weight_clip,
            cfg.loss.effective_beta,
        ).to(session.device)
        precision = cfg.train.precision
        self.autocast = precision == "bfloat16" or (precision == "auto" and session.device.type == "cuda")

    def step(self, step: int, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> dict[str, torch.Tensor]:
        """One update of both branches.

        Returns:
            Its losses (detached scalars), and this rank's pseudo labels, IGNORE off the pixels that count.
        """
        cfg, device = self.plan.cfg, self.session.device
        torch.manual_seed(draw_seed(cfg.seed, "step", step * self.session.world + self.session.rank))  # dropout, whatever came before
        x_l, y_l, valid_l = (t.to(device, non_blocking=True) for t in labeled)
        y_l = y_l.long()
        # Without the cache: older torch hands weights that the pseudo-label pass cast without gradients to the pass that needs them.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            if unlabeled is None:
                z1, z2 = self.net(x_l)
                cps, pseudo = z1.new_zeros(()), None
            else:
                x_u, valid_u, pseudo_u = self._unlabeled(step, unlabeled)
                x_u, valid_u, pseudo_u = self._paste(step, x_l, y_l, x_u, valid_u, pseudo_u)
                z1, z2 = self.net(torch.cat([x_l, x_u]))
                pseudo, where = self._targets(z1, z2, x_l, y_l, valid_l, valid_u, pseudo_u)
                w = self.weights_C if cfg.cps.weighted else None
                cps = losses.cross_pseudo(z1, pseudo[1], where, w) + losses.cross_pseudo(z2, pseudo[0], where, w)
            n = len(x_l)
            sup1, terms1 = losses.supervised(z1[:n], y_l, cfg.loss, self.weights_C)
            sup2, _ = losses.supervised(z2[:n], y_l, cfg.loss, self.weights_C)
            weight = cfg.cps.weight * losses.ramp(step, cfg.train.steps, cfg.cps.ramp_fraction)
            loss = sup1 + sup2 + weight * cps

        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - step / cfg.train.steps) ** cfg.optim.poly_power
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.optim.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), cfg.optim.grad_clip)
        self.optimizer.step()
        self._average(step)
        out = {"loss": loss, "sup1": sup1, "sup2": sup2, "cps": cps} | {f"sup1_{k}": v for k, v in terms1.items()}
        out = {k: v.detach() for k, v in out.items()}
        if pseudo is None:
            return out
        valid = torch.cat([valid_l, valid_u]) & (pseudo[0] != IGNORE) & (pseudo[1] != IGNORE)
        return out | {f"pseudo{k}": torch.where(valid, y, IGNORE) for k, y in enumerate(pseudo, 1)}

    def bind(self) -> None:
        """Wraps the model for its forward pass, once its weights are what they should be."""
        self.net = self.session.wrap(self.model)

    @property
    def published(self) -> TwoBranch:
        """The model that is evaluated and saved: the average where there is one."""
        return self.teacher if self.teacher is not None else self.model

    def _unlabeled(self, step: int, batch: UnlabeledBatch) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
        """Student images, their valid pixels, and pseudo labels where they come from another pass than the student's.

        CutMix of neighbouring draws: u = (1 - M) u0 + M u1, and pseudo labels are the argmax of the same mixture of logits on the
        unmixed images.
        """
        cfg, device = self.plan.cfg, self.session.device
        x_u, valid_u = (t.to(device, non_blocking=True) for t in batch)
        if not cfg.cps.cutmix:
            return x_u, valid_u, None if self.teacher is None else self._pseudo(x_u, valid_u)
        boxes = self._boxes(step, len(x_u) // 2, x_u.shape[-2:]).to(device)
        pseudo_u = [torch.where(boxes, y[1::2], y[0::2]) for y in self._pseudo(x_u, valid_u)]
        return torch.where(boxes[:, None], x_u[1::2], x_u[0::2]), torch.where(boxes, valid_u[1::2], valid_u[0::2]), pseudo_u

    def _paste(
        self, step: int, x_l: torch.Tensor, y_l: torch.Tensor, x_u: torch.Tensor, valid_u: torch.Tensor, pseudo_u: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
        """Puts a class's region of a labelled image, with its hand labels, into some unlabelled images; classes of high weight first."""
        cfg, n, first = self.plan.cfg, len(x_u), self._first(step)
        if not cfg.cps.paste or pseudo_u is None:
            return x_u, valid_u, pseudo_u
        source = torch.arange(n, device=y_l.device) * len(y_l) // n  # the same pairs on any number of ranks that divides both batches
        region = torch.zeros_like(valid_u)
        for i in range(n):
            draw = torch.Generator().manual_seed(draw_seed(cfg.seed, "paste", first + i))
            here = [c for c in y_l[source[i]].unique().tolist() if c != IGNORE]
            if here and torch.rand((), generator=draw) < cfg.cps.paste:
                which = torch.multinomial(self.weights_C[here].cpu(), 1, generator=draw)
                region[i] = y_l[source[i]] == here[int(which)]
        pasted = [torch.where(region, y_l[source], y) for y in pseudo_u]
        return torch.where(region[:, None], x_l[source], x_u), valid_u | region, pasted

    def _boxes(self, step: int, n: int, size_HW: torch.Size) -> torch.Tensor:
        """M of this rank's n pairs, bool [n, H, W]."""
        cps, first = self.plan.cfg.cps, self._first(step)
        seeds = [draw_seed(self.plan.cfg.seed, "cutmix", pair) for pair in range(first, first + n)]
        height, width = size_HW
        return torch.cat([cutmix_boxes(1, height, width, cps.cutmix_boxes, cps.cutmix_area, seed) for seed in seeds])

    def _first(self, step: int) -> int:
        """Number of this rank's first unlabelled image after mixing: counted over all ranks, so that no layout changes a mixture."""
        batch = self.plan.cfg.train.batch_unlabeled
        return step * batch + span(batch, self.session.rank, self.session.world).start

    @torch.no_grad()
    def _pseudo(self, x: torch.Tensor, valid: torch.Tensor) -> list[torch.Tensor]:
        model = self.teacher or self.model
        with nullcontext() if self.plan.cfg.cps.pseudo_dropout else without_dropout(model):
            return [self._labels(z, valid) for z in model(x)]

    def _labels(self, z: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return losses.pseudo_labels(z.detach(), self.plan.cfg.cps.threshold, self.plan.cfg.cps.class_threshold, valid)

    def _targets(
        self,
        z1: torch.Tensor,
        z2: torch.Tensor,
        x_l: torch.Tensor,
        y_l: torch.Tensor,
        valid_l: torch.Tensor,
        valid_u: torch.Tensor,
        pseudo_u: list[torch.Tensor] | None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Pseudo labels [n + m, H, W] of both branches over labelled and unlabelled images, and where they count."""
        cfg, n = self.plan.cfg.cps, len(x_l)
        own = [self._labels(z, torch.cat([valid_l, valid_u])) for z in (z1, z2)]
        if pseudo_u is None:
            pseudo = own
        else:
            labeled = self._pseudo(x_l, valid_l) if self.teacher is not None and (cfg.on_null or not cfg.cutmix) else [y[:n] for y in own]
            pseudo = [torch.cat([a, b]) for a, b in zip(labeled, pseudo_u, strict=True)]
        blank = y_l == IGNORE
        where_l = valid_l & (blank if cfg.cutmix else torch.ones_like(blank))
        if not cfg.on_null:
            where_l = where_l & ~blank
        return pseudo, torch.cat([where_l, valid_u])

    @torch.no_grad()
    def _average(self, step: int) -> None:
        if self.teacher is None:
            return
        # A plain mean of all steps until that is the longer memory: the random start must not linger in a short run.
        decay = min(self.plan.cfg.cps.ema_decay, 1 - 1 / (step + 1))
        for average, new in zip(self.teacher.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(new, 1 - decay)
            else:
                average.copy_(new)

    def _warm_start(self, uri: str) -> None:
        loaded = checkpoint.load(uri)
        checkpoint.require_classes(uri, loaded.info, self.plan.dataset.label_set)
        self.model.load_state_dict(loaded.model.state_dict())


METHODS: dict[Method, Callable[[Plan, Session], Learner]] = {"cps_mars": Learner}
"""How a method's networks learn, by its name in the configuration. Another method is another class with `Learner`'s methods."""


def train(plan: Plan, session: Session) -> None:
    """Runs the schedule from the newest checkpoint, or from the start, to its end."""
    cfg = plan.cfg
    if session.rank == 0:
        for left in Path(tempfile.gettempdir()).glob(f"{_scratch(plan)}*"):  # of a process that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
    learner = METHODS[cfg.method](plan, session)
    progress = _resume(learner, session) or Progress(schedule=plan.schedule())
    learner.bind()
    session.log({"start": progress.step, "world": session.world, "class_weights": _round(learner.weights_C.tolist())}, progress.step)
    draws = Draws(plan.dataset, plan.labeled, cfg, "labeled")
    feed = loader(draws, progress.step, cfg.train.steps, cfg.train.batch_labeled, session.rank, session.world, cfg.compute.loader_workers)
    labeled: Iterator[LabeledBatch] = iter(feed)
    unlabeled = session.unlabeled(progress.step) if plan.semi_supervised else None
    meter = _Meter(plan)

    for step in range(progress.step, cfg.train.steps):
        waiting = time.perf_counter()
        batch_l, batch_u = next(labeled), next(unlabeled) if unlabeled is not None else None
        meter.waited(time.perf_counter() - waiting)
        out = learner.step(step, batch_l, batch_u)

        done = step + 1
        last = done == cfg.train.steps
        if done % cfg.train.log_every == 0 or last:
            session.log({"step": done} | meter.read(out, learner.optimizer))
        evaluation = None
        if plan.val and (last or (cfg.train.eval_every and done % cfg.train.eval_every == 0)):
            evaluation = _evaluate(learner, session)
            session.log({"step": done, "eval": evaluation.to_dict(plan.dataset.label_set.classes)})
            meter.restart()
        if last or evaluation or done % cfg.train.checkpoint_every == 0:
            progress.step = done
            _save(learner, session, progress, evaluation)


def _evaluate(learner: Learner, session: Session) -> Evaluation:
    plan = learner.plan
    _share_buffers(learner.published, session.world)
    training = learner.published.training
    predictor = Predictor(learner.published, model_info(plan), session.device)
    result = evaluate(predictor, plan.dataset, plan.val, plan.cfg.train.eval_batch, session.rank, session.world, session.device)
    learner.published.train(training)
    return result


def _save(learner: Learner, session: Session, progress: Progress, evaluation: Evaluation | None) -> None:
    """Reports a checkpoint; one without an evaluation scores -1, so that "best" is among the evaluated ones."""
    _share_buffers(learner.model, session.world)
    if learner.teacher is not None:
        _share_buffers(learner.teacher, session.world)
    metrics = {"step": progress.step, "miou": evaluation.miou if evaluation else -1.0}
    progress.best_miou = max(progress.best_miou, metrics["miou"])
    folder = None
    if session.rank == 0:
        folder = Path(tempfile.mkdtemp(prefix=_scratch(learner.plan)))
        measured = evaluation.to_dict(learner.plan.dataset.label_set.classes) if evaluation else None
        checkpoint.save(str(folder), learner.published, model_info(learner.plan, progress.step, measured))
        save_state(folder, progress, learner.model if learner.teacher is not None else None, learner.optimizer)
    session.report(metrics, folder)


def _scratch(plan: Plan) -> str:
    """Prefix of the folders in which this training, of this run folder, prepares its checkpoints."""
    return f"raysal-{digest_of([plan.cfg.run, plan.schedule()])[:16]}-"


@torch.no_grad()
def _share_buffers(model: nn.Module, world: int) -> None:
    """Gives all ranks the mean of their batch-norm statistics: one model is measured and saved, and a resumed run continues from it."""
    if world > 1:
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= world


def model_info(plan: Plan, step: int = 0, measured: dict | None = None) -> checkpoint.ModelInfo:
    """What a checkpoint of this plan says about itself."""
    cfg = plan.cfg
    return checkpoint.ModelInfo(
        label_set=plan.dataset.label_set,
        model=cfg.model,
        input_scale=cfg.data.input_scale,
        tile_px=cfg.augment.crop_px,
        predict=cfg.model.predict,
        parents=plan.parents | {"config_digest": cfg.training_digest(), "labels": len(plan.labeled), "step": step, "metrics": measured},
    )


def _resume(learner: Learner, session: Session) -> Progress | None:
    with session.resume() as folder:
        if folder is None:
            return None
        loaded = checkpoint.load(str(folder))
        learner.published.load_state_dict(loaded.model.state_dict())
        student = learner.model if learner.teacher is not None else None
        progress = load_state(folder, student, learner.optimizer, session.device)
    if progress.schedule != learner.plan.schedule():
        raise CheckpointError(
            f"{learner.plan.cfg.run}: this training was started with another configuration or other labels; "
            "use another run folder, or go back to the configuration it was started with"
        )
    return progress


def _optimizer(model: TwoBranch, cfg: Config) -> torch.optim.Optimizer:
    encoder = [p for branch in model.branches for p in branch.get_submodule("encoder").parameters()]
    known = {id(p) for p in encoder}
    head = [p for p in model.parameters() if id(p) not in known]
    groups = [
        {"params": encoder, "lr": cfg.optim.lr, "base_lr": cfg.optim.lr},
        {"params": head, "lr": cfg.optim.lr * cfg.optim.head_lr_multiple, "base_lr": cfg.optim.lr * cfg.optim.head_lr_multiple},
    ]
    if cfg.optim.name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=cfg.optim.weight_decay)
    return torch.optim.SGD(groups, lr=cfg.optim.lr, momentum=cfg.optim.momentum, weight_decay=cfg.optim.weight_decay)


class _Meter:
    """Time and agreement between two log lines."""

    def __init__(self, plan: Plan) -> None:
        self.images = plan.cfg.train.batch_labeled + (plan.cfg.train.batch_unlabeled if plan.semi_supervised else 0)
        self.classes: Sequence[str] = plan.dataset.label_set.classes
        self.restart()

    def restart(self) -> None:
        self.started, self.wait_s, self.steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        self.wait_s += seconds
        self.steps += 1

    def read(self, out: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict:
        """One record; the only place in the loop that waits for the device."""
        record: dict = {k: round(v.item(), 5) for k, v in out.items() if v.ndim == 0}
        seconds = time.perf_counter() - self.started
        record |= {
            "lr": optimizer.param_groups[0]["lr"],
            "images_per_second": round(self.steps * self.images / seconds, 3),
            "step_s": round(seconds / self.steps, 4),
            "data_wait_s": round(self.wait_s / self.steps, 4),
        }
        if "pseudo1" in out:
            record["agreement"] = self._agreement(out["pseudo1"], out["pseudo2"])
        self.restart()
        return record

    def _agreement(self, first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
        """Of the pixels that branch 1 calls a class, the share on which branch 2 agrees; classes it never names are left out."""
        n = len(self.classes)
        named = torch.bincount(first.flatten(), minlength=n)  # IGNORE lies behind the classes
        agreed = torch.bincount(first[first == second].flatten(), minlength=n)
        return {c: round((agreed[i] / named[i]).item(), 4) for i, c in enumerate(self.classes) if named[i] > 0}


def _round(values: list[float]) -> list[float]:
    return [round(v, 4) for v in values]
