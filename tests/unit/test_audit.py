"""Masks are audited with a few random labels: the estimate, its interval, and what thresholds of confidence come to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from raysal.model.audit import class_iou, estimate, pool_confusion
from raysal.model.metrics import ClassReliability, iou

COUNTS = arrays(np.int64, st.tuples(st.integers(1, 6), st.just(4), st.just(4)), elements=st.integers(0, 1000))


@settings(max_examples=60, deadline=None)
@given(COUNTS)
def test_an_audit_of_the_whole_pool_is_its_iou(audit_NCC):
    whole_CC = audit_NCC.sum(0)
    np.testing.assert_allclose(pool_confusion(whole_CC, whole_CC.sum(0)), whole_CC, rtol=1e-12)
    np.testing.assert_allclose(class_iou(whole_CC.astype(float)), iou(whole_CC).numpy(), rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(COUNTS, st.integers(0, 5))
def test_estimates_lie_in_their_intervals_bounds(audit_NCC, seed):
    miou, classes = estimate(audit_NCC, audit_NCC.sum((0, 1)), seed)
    for e in (miou, *classes):
        if not np.isnan(e.value):
            assert 0 <= e.value <= 1
            assert len(audit_NCC) == 1 or 0 <= e.low <= e.high <= 1
        assert all(v is None or v == v for v in e.to_dict().values())


def test_what_the_pool_predicts_weighs_what_the_audit_saw():
    # The audit saw classes 0 and 1 equally often, and class 1 is right half the time; the pool is nearly all class 0.
    audit_NCC = np.array([[[100, 50], [0, 50]]] * 4)
    even, _ = estimate(audit_NCC, np.array([1, 1]))
    mostly_0, classes = estimate(audit_NCC, np.array([99, 1]))
    assert classes[0].value == pytest.approx(99 / 99.5) and classes[1].value == pytest.approx(0.5)
    assert mostly_0.value > even.value
    assert mostly_0.low == mostly_0.high == pytest.approx(mostly_0.value)  # all images alike: nothing to doubt


def test_a_class_that_the_audit_never_met_is_not_known():
    audit_NCC = np.zeros((3, 3, 3))
    audit_NCC[:, 0, 0] = [10, 20, 30]
    miou, classes = estimate(audit_NCC, np.array([100, 50, 0]))
    assert classes[0].value == 1 and np.isnan(classes[1].value) and np.isnan(classes[2].value)
    assert miou.value == 1 and classes[1].to_dict() == {"value": None, "low": None, "high": None}


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    classes, pool = 4, 400
    mix = rng.dirichlet([3.0] * classes, size=pool)  # each image its own mixture of classes and its own error rate
    wrong = rng.beta(2, 6, size=pool)
    images = np.zeros((pool, classes, classes))
    for i in range(pool):
        for p in range(classes):
            truth = np.full(classes, wrong[i] / (classes - 1))
            truth[p] = 1 - wrong[i]
            images[i, :, p] = rng.multinomial(int(4096 * mix[i, p]), truth)
    predicted_C, true = images.sum((0, 1)), float(np.nanmean(class_iou(images.sum(0))))
    held = 0
    for seed in range(60):
        drawn = rng.choice(pool, 30, replace=False)
        found, _ = estimate(images[drawn], predicted_C, seed)
        held += found.low <= true <= found.high
    assert held >= 51  # 95% of 60 is 57; fewer than 51 has a chance under 1% at 95%, and near none at 90%


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        estimate(np.zeros((0, 2, 2)), np.ones(2))


def test_thresholds_reach_the_precision_that_was_asked_for():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(1, 100, 100, generator=generator)
    predicted = torch.randint(0, 2, (1, 100, 100), generator=generator)
    right = torch.rand(1, 100, 100, generator=generator) < confidence  # calibrated: as right as it is sure
    truth = torch.where(right, predicted, 1 - predicted)
    truth[0, :5] = 255
    reliability = ClassReliability(3)
    reliability.add(predicted, confidence, truth)
    found = reliability.thresholds(0.9)
    assert found[0] == pytest.approx(0.8, abs=0.05) and found[1] == pytest.approx(0.8, abs=0.05)  # mean of 0.8 to 1 is 0.9
    assert found[2] is None  # never predicted
    for (kept, ok), threshold in list(zip(reliability.at(found), found, strict=True))[:2]:
        assert ok / kept >= 0.9
        this = predicted[0, 5:] == (0 if threshold is found[0] else 1)
        assert kept <= int(this.sum())
    entry = reliability.to_dict(["a", "b", "c"])[1]
    assert entry["precision"] == 0.9 and entry["reached"]["c"] is None and entry["kept"]["c"] is None
    assert entry["kept_of_all"] == pytest.approx(0.2, abs=0.05)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1), st.sampled_from([0, 1, 255])), min_size=1, max_size=40))
def test_counts_are_of_labelled_pixels_and_add_up(pixels):
    predicted, confidence, truth = (torch.tensor(c).view(1, 1, -1) for c in zip(*pixels, strict=True))
    whole, parts = ClassReliability(2), ClassReliability(2)
    whole.add(predicted, confidence, truth)
    for i in range(len(pixels)):
        parts.add(predicted[..., i : i + 1], confidence[..., i : i + 1], truth[..., i : i + 1])
    assert torch.equal(whole.counts, parts.counts)
    assert int(whole.counts[0].sum()) == sum(t != 255 for _, _, t in pixels)
    assert int(whole.counts[1].sum()) == sum(p == t for p, _, t in pixels)
