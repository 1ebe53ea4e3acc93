"""Metrics equal scikit-learn's and torchmetrics', and add up over batches."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics
import torchmetrics.classification as tmc
from hypothesis import given, settings, strategies as st
from torchmetrics.segmentation import MeanIoU

from raysal.labels import IGNORE
from raysal.model.metrics import Calibration, accuracy, confusion, iou, miou

quick = settings(max_examples=40, deadline=None)
seeds = given(st.integers(0, 2**32 - 1))


def masks(seed: int, n: int = 5, ignore: float = 0.3, every_class: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, n, (3, 7, 6), generator=g)
    pred = torch.where(torch.rand(truth.shape, generator=g) < 0.6, truth, torch.randint(0, n, truth.shape, generator=g))
    truth[torch.rand(truth.shape, generator=g) < ignore] = IGNORE
    if every_class:
        truth[0, 0, :n] = torch.arange(n)
    return pred, truth


@quick
@seeds
def test_confusion_is_scikit_learns_on_labelled_pixels(seed: int) -> None:
    pred, truth = masks(seed)
    labelled = truth != IGNORE
    expected = sklearn.metrics.confusion_matrix(truth[labelled], pred[labelled], labels=range(5))
    counts = confusion(pred, truth, 5)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), expected)
    assert accuracy(counts) == pytest.approx(sklearn.metrics.accuracy_score(truth[labelled], pred[labelled]))


@quick
@seeds
def test_iou_is_torchmetrics_jaccard_index_with_ignored_pixels(seed: int) -> None:
    pred, truth = masks(seed, every_class=True)
    counts = confusion(pred, truth, 5)
    per_class = tmc.MulticlassJaccardIndex(5, average="none", ignore_index=IGNORE)(pred, truth)
    torch.testing.assert_close(iou(counts).float(), per_class, rtol=1e-5, atol=1e-6)
    mean = torchmetrics.JaccardIndex(task="multiclass", num_classes=5, average="macro", ignore_index=IGNORE)(pred, truth)
    assert miou(counts) == pytest.approx(mean.item(), rel=1e-5)


@quick
@seeds
def test_miou_is_torchmetrics_mean_iou_of_one_image(seed: int) -> None:
    """torchmetrics' MeanIoU averages over images and ignores nothing; ours pools them: the two meet at one image."""
    pred, truth = masks(seed, ignore=0.0, every_class=True)
    library = MeanIoU(5, input_format="index")
    assert miou(confusion(pred[:1], truth[:1], 5)) == pytest.approx(library(pred[:1], truth[:1]).item(), rel=1e-5)


@quick
@seeds
def test_confusion_adds_up_over_batches(seed: int) -> None:
    pred, truth = masks(seed)
    assert torch.equal(sum(confusion(p, t, 5) for p, t in zip(pred, truth, strict=True)), confusion(pred, truth, 5))


def test_a_class_in_neither_truth_nor_prediction_is_nan_and_does_not_count() -> None:
    counts = confusion(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 4)
    assert iou(counts)[:2].tolist() == [0.5, 0.5]
    assert iou(counts)[2:].isnan().all()
    assert miou(counts) == 0.5


def test_a_class_predicted_but_absent_counts_as_0() -> None:
    counts = confusion(torch.tensor([0, 2]), torch.tensor([0, 0]), 3)
    assert iou(counts)[2] == 0
    assert miou(counts) == 0.25


def test_without_labels_metrics_are_nan() -> None:
    counts = confusion(torch.zeros(4, dtype=torch.int64), torch.full((4,), IGNORE), 3)
    assert counts.sum() == 0
    assert math.isnan(miou(counts)) and math.isnan(accuracy(counts))


def test_confusion_reads_bytes_and_arrays() -> None:
    pred, truth = masks(0)
    expected = confusion(pred, truth, 5)
    assert torch.equal(confusion(pred.to(torch.uint8), truth.to(torch.uint8), 5), expected)
    assert torch.equal(confusion(pred.numpy().astype(np.uint8), truth.numpy().astype(np.uint8), 5), expected)


def test_confusion_refuses_ids_outside_the_classes_and_other_shapes() -> None:
    with pytest.raises(ValueError, match="expected 0 to 2"):
        confusion(torch.tensor([0, 1]), torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        confusion(torch.tensor([0, 7]), torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="must be equal"):
        confusion(torch.zeros(2, 3), torch.zeros(3, 2), 3)


def probabilities(seed: int, n: int = 4, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    p = (scale * torch.randn(2, n, 9, 8, generator=g)).softmax(1)
    truth = torch.randint(0, n, (2, 9, 8), generator=g)
    truth[torch.rand(truth.shape, generator=g) < 0.3] = IGNORE
    return p, truth


@quick
@seeds
def test_ece_is_torchmetrics_calibration_error(seed: int) -> None:
    p, truth = probabilities(seed)
    calibration = Calibration()
    calibration.add(p, truth)
    expected = tmc.MulticlassCalibrationError(4, n_bins=15, norm="l1", ignore_index=IGNORE)(p, truth)
    assert calibration.ece() == pytest.approx(expected.item(), abs=1e-5)


def test_calibration_adds_up_over_batches_and_workers() -> None:
    p, truth = probabilities(1)
    whole, first, second = Calibration(), Calibration(), Calibration()
    whole.add(p, truth)
    first.add(p[:1], truth[:1])
    second.add(p[1:].numpy(), truth[1:].numpy())
    for mine, theirs in zip(first.tensors(), second.tensors(), strict=True):
        mine += theirs
    assert first.ece() == pytest.approx(whole.ece(), abs=1e-12)
    assert first.to_dict()["pixels"] == whole.to_dict()["pixels"]


def test_certain_and_right_pixels_are_calibrated_and_certain_and_wrong_ones_are_off_by_1() -> None:
    p = torch.zeros(1, 2, 1, 4)
    p[:, 0] = 1.0
    right, wrong = Calibration(), Calibration()
    right.add(p, torch.zeros(1, 1, 4, dtype=torch.int64))
    wrong.add(p, torch.ones(1, 1, 4, dtype=torch.int64))
    assert right.ece() == 0 and wrong.ece() == 1
    assert right.to_dict()["pixels"] == [0] * 14 + [4]  # confidence 1 belongs to the last bin


def test_calibration_is_json_also_while_empty() -> None:
    empty = Calibration()
    assert json.loads(json.dumps(empty.to_dict(), allow_nan=False))["ece"] is None
    empty.add(*probabilities(2))
    text = json.dumps(empty.to_dict(), allow_nan=False)
    assert len(json.loads(text)["edges"]) == 16
