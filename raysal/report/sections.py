"""The charts of the page, each with the sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from raysal.report import figures
from raysal.report.asked import bought_images, bought_pixels
from raysal.report.charts import Chart, Easel, audited, measured
from raysal.report.gather import Round, Run, mapping, mean_fractions, numbers, rows
from raysal.words import number


@dataclass(frozen=True)
class Desk(Easel):
    """What the sections of a run are made from."""

    notes: Run

    @property
    def run(self) -> Run:
        return self.notes


def labels_of(this: Round) -> int:
    """Labels bought up to and with this round; 0 where metrics.json does not say."""
    n = number(this.metrics.get("labels"))
    return 0 if np.isnan(n) else int(n)


def full_miou(run: Run) -> float | None:
    """Full supervision's val mIoU where the configuration knows it."""
    return (run.config.loop.full_miou or None) if run.config else None


def learning(desk: Desk) -> list[Chart]:
    """Val mIoU against labels bought."""
    done = desk.run.finished
    if not done:
        return []
    labels_R = np.array([labels_of(r) for r in done], dtype=np.float64)
    miou_R = np.array([number(r.metrics.get("miou")) for r in done])
    full = full_miou(desk.run)
    caption = "Each dot is one round: the further right, the more labels experts gave; the higher, the better the masks of held-out images."
    if full:
        caption += f" The dashed line is a model trained on every label ({100 * full:.1f} %)."
    return desk.draw(
        "learning_curve", "Learning curve", caption, lambda t: figures.learning_curve(labels_R, miou_R, desk.run.pool, full, t), wide=True
    )


def by_class(desk: Desk) -> list[Chart]:
    """IoU of each class by round, and what share of the labels each class got."""
    done, colors = desk.run.finished, desk.label_set.colors
    charts: list[Chart] = []
    wide = len(done) > 7
    if done:
        iou_RC = np.stack([numbers(r.metrics.get("iou"), desk.classes) for r in done])
        names = [f"{r.number}\n({labels_of(r)})" for r in done]
        charts += desk.draw(
            "class_iou", "Quality of each class by round (IoU, %)",
            "IoU is the overlap of the model's area with the expert's: 100 means the same pixels, 0 none in common; read a row from left "
            "to right to see whether more labels helped that class (n/a: the class is in no held-out image).",
            lambda t: figures.class_iou(names, desk.classes, colors, iou_RC, t), wide=wide,
        )  # fmt: skip
    bought_C = bought_pixels(desk.run, len(desk.classes))
    if bought_C.any():
        pool_C = pool_fractions(desk)
        images_C = bought_images(desk.run, len(desk.classes))
        caption = "A dot is the share of labelled pixels that experts gave to the class, beside the number of images that show it."
        if pool_C is not None:
            caption = (
                "Where the filled dot lies right of the hollow one, experts were shown more of the class than the archive holds on "
                "average; the pool's shares are the model's own predictions, as its labels are not ours to read."
            )
        charts += desk.draw(
            "class_balance", "Class balance of the labels bought" + ("" if pool_C is None else ", against the pool"), caption,
            lambda t: figures.class_balance(desk.classes, colors, bought_C.astype(np.float64), pool_C, images_C, t, wide), wide=wide,
        )  # fmt: skip
    return charts


def pool_fractions(desk: Desk) -> np.ndarray | None:
    """Mean predicted share of each class over the pool, from the newest scores there are."""
    for this in reversed(desk.run.rounds):
        table = rows(desk.run, this.scores, f"rounds/{this.number:03d}/scores", ["class_fractions"])
        found = desk.run.attempt(f"class fractions of round {this.number}", partial(mean_fractions, table, len(desk.classes)), None)
        if found is not None:
            return found
    return None


def trust(desk: Desk) -> list[Chart]:
    """Confusion and calibration of the last finished round, and the audit."""
    return measured(desk, desk.run.finished[-1].metrics) + audited(desk, desk.run.audit) if desk.run.finished else []


def training(desk: Desk) -> list[Chart]:
    """Losses and agreement of the last round that trained."""
    logged = [r for r in desk.run.rounds if any("loss" in line for line in r.steps)]
    if not logged:
        return []
    last = logged[-1]
    lines = [line for line in last.steps if "loss" in line and np.isfinite(number(line.get("step")))]
    steps_T = np.array([number(line["step"]) for line in lines])
    names = {"loss": "total", "sup1": "labels, branch 1", "sup2": "labels, branch 2", "cps": "branches teach each other"}
    terms = {name: np.array([number(line.get(key)) for line in lines]) for key, name in names.items()}
    charts = desk.draw(
        "losses", f"Losses, round {last.number}",
        "Lower is better: how far the branches are from the experts' labels, and from each other's masks on images without labels; "
        "thin lines are single measurements.",
        lambda t: figures.losses(steps_T, {k: v for k, v in terms.items() if np.isfinite(v).any()}, t),
    )  # fmt: skip
    agreement_TC = np.stack([numbers(line.get("agreement"), desk.classes) for line in lines])
    if np.isfinite(agreement_TC).any():
        charts += desk.draw(
            "agreement", f"Agreement of the two branches, round {last.number}",
            "Of the pixels that one branch gives to a class, the share on which the other agrees, while training goes from left to right; "
            "rows that stay faint are classes on which the branches can't teach each other yet.",
            lambda t: figures.agreement(steps_T, desk.classes, desk.label_set.colors, agreement_TC, t),
        )  # fmt: skip
    return charts


def times(run: Run) -> dict[str, dict[str, float]]:
    """Seconds by stage, for each round: from the stages' markers, else from the metrics."""
    found = {}
    for this in run.rounds:
        marked = {name: number(stage.get("seconds")) for name, stage in this.stages.items()}
        spent = marked or {name: number(s) for name, s in mapping(this.metrics.get("seconds")).items()}
        found[f"round {this.number}"] = {name: s for name, s in spent.items() if s >= 0}
    return {name: stages for name, stages in found.items() if stages}


def rates(run: Run) -> dict[str, float]:
    """Images per second by stage, from the last round that measured it."""
    found: dict[str, float] = {}
    for this in run.rounds:
        trained = [number(line.get("images_per_second")) for line in this.steps]
        if any(rate > 0 for rate in trained):
            found["train"] = float(np.nanmedian(trained))
        measured = mapping(this.metrics.get("images_per_second"))
        measured |= {name: mapping(stage.get("outputs")).get("images_per_second") for name, stage in this.stages.items()}
        found |= {name: number(rate) for name, rate in measured.items() if number(rate) > 0}
    return found


def effort(desk: Desk) -> list[Chart]:
    """Seconds and images per second by stage."""
    spent, charts = times(desk.run), []
    if spent:
        stages = list(dict.fromkeys(stage for row in spent.values() for stage in row))
        seconds_RS = np.array([[row.get(stage, 0.0) for stage in stages] for row in spent.values()])
        charts += desk.draw(
            "seconds", "Where the time went",
            "One bar a round, cut into its stages; the number at its end is the total.",
            lambda t: figures.seconds(list(spent), stages, seconds_RS, t),
        )  # fmt: skip
    speed = rates(desk.run)
    if speed:
        charts += desk.draw(
            "throughput", "Speed",
            "Images per second that each stage got through, when it last ran; divide the number of images in an archive by it to plan.",
            lambda t: figures.throughput(list(speed), np.array(list(speed.values())), t),
        )  # fmt: skip
    return charts


SECTIONS: dict[str, Callable[[Desk], list[Chart]]] = {
    "learning": learning,
    "by_class": by_class,
    "trust": trust,
    "training": training,
    "effort": effort,
}
