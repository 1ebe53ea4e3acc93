"""Masks are audited with a few random labels: the estimate, its interval, and what thresholds of confidence come to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from raysal.model.audit import LEAST_IMAGES, class_iou, estimate, pool_confusion
from raysal.model.metrics import SUPPORT, ClassReliability, iou

COUNTS = arrays(np.int64, st.tuples(st.integers(5, 8), st.just(5), st.just(4)), elements=st.integers(0, 1000))
"""Images, truth (the last one: left blank), prediction."""


@settings(max_examples=60, deadline=None)
@given(COUNTS)
def test_an_audit_of_the_whole_pool_is_its_iou_whatever_was_left_blank(counts_NRC):
    audit_NCC, blank_NC = counts_NRC[:, :4], counts_NRC[:, 4]
    whole_CC, blank_C = audit_NCC.sum(0), blank_NC.sum(0)
    np.testing.assert_allclose(pool_confusion(whole_CC, blank_C, whole_CC.sum(0) + blank_C), whole_CC, rtol=1e-12)
    np.testing.assert_allclose(class_iou(whole_CC.astype(float)), iou(whole_CC).numpy(), rtol=1e-12)
    miou, classes = estimate(audit_NCC, blank_NC, whole_CC.sum(0) + blank_C, len(audit_NCC))
    shown = (audit_NCC.sum(2) > 0).sum(0) >= LEAST_IMAGES
    true = iou(whole_CC).numpy()
    for c in range(4):
        assert classes[c].value == pytest.approx(true[c]) if shown[c] else np.isnan(classes[c].value)
        assert not shown[c] or classes[c].low == classes[c].high == classes[c].value  # all of the pool: nothing is left open
    assert not shown.any() or miou.value == pytest.approx(true[shown].mean())


@settings(max_examples=20, deadline=None)
@given(COUNTS, st.integers(0, 5))
def test_estimates_lie_in_their_intervals_within_bounds(counts_NRC, seed):
    miou, classes = estimate(counts_NRC[:, :4], counts_NRC[:, 4], counts_NRC.sum((0, 1)), 100, seed)
    for e in (miou, *classes):
        assert np.isnan(e.value) or 0 <= e.low <= e.value <= e.high <= 1
        assert all(v is None or v == v for v in e.to_dict().values())


def test_what_the_pool_predicts_weighs_what_the_audit_saw():
    # The audit saw classes 0 and 1 equally often, and class 1 is right half the time; the pool is nearly all class 0.
    audit_NCC, blank_NC = np.array([[[100, 50], [0, 50]]] * 5), np.zeros((5, 2))
    even, _ = estimate(audit_NCC, blank_NC, np.array([1, 1]), 100)
    mostly_0, classes = estimate(audit_NCC, blank_NC, np.array([99, 1]), 100)
    assert classes[0].value == pytest.approx(99 / 99.5) and classes[1].value == pytest.approx(0.5)
    assert mostly_0.value > even.value
    assert mostly_0.low == mostly_0.high == pytest.approx(mostly_0.value)  # all images alike: nothing to doubt


def test_a_class_that_few_audited_images_show_gets_no_number():
    audit_NCC = np.zeros((LEAST_IMAGES, 3, 3))
    audit_NCC[:, 0, 0] = 10
    audit_NCC[1:, 1, 1] = 5  # one image too few
    miou, classes = estimate(audit_NCC, np.zeros((LEAST_IMAGES, 3)), np.array([100, 50, 7]), 50)
    assert classes[0].value == 1 and np.isnan(classes[1].value) and np.isnan(classes[2].value)
    assert miou.value == 1 and classes[1].to_dict() == {"value": None, "low": None, "high": None}
    nothing, _ = estimate(audit_NCC[:2], np.zeros((2, 3)), np.array([100, 50, 7]), 50)
    assert np.isnan(nothing.value)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Over the classes that an audit knows; the rarest is in one of twenty images, like a steep slope."""
    rng = np.random.default_rng(0)
    classes, pool = 4, 400
    mix = rng.dirichlet([3.0, 3.0, 1.0], size=pool)  # each image its own mixture of classes and its own error rate
    rare = (rng.random(pool) < 0.05) * rng.uniform(0.1, 0.5, pool)
    mix = np.column_stack([mix * (1 - rare[:, None]), rare])
    wrong = rng.beta(2, 6, size=pool)
    images = np.zeros((pool, classes, classes))
    for i in range(pool):
        for t in range(classes):
            predicted = np.full(classes, wrong[i] / (classes - 1))
            predicted[t] = 1 - wrong[i]
            images[i, t] = rng.multinomial(int(4096 * mix[i, t]), predicted)
    predicted_C, true_C = images.sum((0, 1)), class_iou(images.sum(0))
    held = 0
    for seed in range(60):
        drawn = rng.choice(pool, 30, replace=False)
        found, by_class = estimate(images[drawn], np.zeros((30, classes)), predicted_C, pool, seed)
        known = [c for c, e in enumerate(by_class) if not np.isnan(e.value)]
        held += found.low <= true_C[known].mean() <= found.high
    assert held >= 51  # 95% of 60 is 57; fewer than 51 has a chance under 1% at 95%, and near none at 90%


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        estimate(np.zeros((0, 2, 2)), np.zeros((0, 2)), np.ones(2), 10)


def test_thresholds_reach_the_precision_that_was_asked_for():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(1, 200, 200, generator=generator)
    predicted = torch.randint(0, 2, (1, 200, 200), generator=generator)
    right = torch.rand(1, 200, 200, generator=generator) < confidence  # calibrated: as right as it is sure
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


def test_a_handful_of_right_pixels_is_no_threshold():
    reliability = ClassReliability(2)
    for n, confidence, right in ((SUPPORT - 1, 0.95, True), (SUPPORT, 0.6, False)):
        for predicted in (0, 1):
            if predicted == 0 or right:
                truth = torch.full((1, n, 1), predicted if right else 1 - predicted)
                reliability.add(torch.full((1, n, 1), predicted), torch.full((1, n, 1), confidence), truth)
    assert reliability.thresholds(0.9) == [None, None]
    reliability.add(*(torch.tensor([[[value]]]) for value in (1, 0.95, 1)))
    assert reliability.thresholds(0.9) == [None, 0.0]


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
